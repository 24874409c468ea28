"""One pass per token and the suffix prefill: what is run, and that outputs and cache stay exact.

float64 throughout; the bound is rounding, because sums run in another order.
"""

import pytest
import torch

from pltmoe.hf import modeling_plt_moe
from pltmoe.hf.modeling_plt_moe import PLTMoECache, slots_needed
from tests.unit.hf.decoding import (
    BOUND,
    SHORT_WINDOW,
    assert_same_cache,
    left_padded,
    short_window,
)
from tests.unit.hf.models import MODELS, pair, small_model, tokens

SHIFTED = [name for name, fields in MODELS.items() if fields.get("cross_loop_shift")]


class Recorder:
    """Counts calls: rows of each layer and loop, attention calls, rows of a layer's experts."""

    def __init__(self, model, monkeypatch):
        self.layers, self.attention, self.experts = [], [], []
        for layer in model.model.layers:
            layer.register_forward_hook(self._layer, with_kwargs=True)
            if hasattr(layer.mlp, "experts"):
                layer.mlp.experts.register_forward_hook(lambda _, x, y: self.experts.append(len(y)))
        attend = modeling_plt_moe.attend_sdpa
        monkeypatch.setitem(
            modeling_plt_moe.ATTEND,
            "sdpa",
            lambda q, k, v, piece: self.attention.append(q.shape) or attend(q, k, v, piece),
        )

    def _layer(self, layer, args, kwargs, out):
        self.layers.append((kwargs["loop"], args[0].size(1)))


@torch.no_grad()
@pytest.mark.parametrize("name", SHIFTED)
def test_a_decoded_slot_is_one_pass(name, monkeypatch):
    """Each layer runs once with L rows; the experts of a layer run once for all rows."""
    m = small_model(name)
    _, model = pair(m)
    x = tokens(2, 9)
    cache = model(x[:, :8], use_cache=True).past_key_values
    recorder = Recorder(model, monkeypatch)
    out = model(x[:, 8:], past_key_values=cache, use_cache=True)
    assert recorder.layers == [(None, m.num_loops)] * m.num_layers
    if m.is_moe:
        assert recorder.experts == [2 * m.num_loops] * m.num_layers
    calls = len(recorder.attention) / m.num_layers
    if m.share_first_loop_kv:
        assert calls == 1 + (m.num_loops - 1) * m.gated_swa
        queries = m.num_loops * m.num_attention_heads // m.num_kv_heads
        assert recorder.attention[0] == (2, m.num_kv_heads, queries, m.head_dim)
    else:
        assert calls == m.num_loops
    assert (out.logits - model(x).logits[:, -1:]).abs().max() < BOUND


@torch.no_grad()
@pytest.mark.parametrize("name", ["plt3_normed", "clp", "plt2_mha"])
def test_a_decoded_slot_with_attention_written_out(name):
    _, model = pair(small_model(name), attn_implementation="eager")
    ids, mask = left_padded([tokens(1, 8), tokens(1, 3)])
    more = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
    cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
    found = model(tokens(2, 1), attention_mask=more, past_key_values=cache).logits
    expected = model(torch.cat([ids, tokens(2, 1)], 1), attention_mask=more).logits
    assert (found - expected[:, -1:]).abs().max() < BOUND


@torch.no_grad()
@pytest.mark.parametrize("name", ["loop3", "plt2_no_shift"])
def test_without_shift_loops_run_one_after_another(name, monkeypatch):
    m = small_model(name)
    _, model = pair(m)
    cache = model(tokens(1, 8), use_cache=True).past_key_values
    recorder = Recorder(model, monkeypatch)
    model(tokens(1, 1), past_key_values=cache, use_cache=True)
    loops = range(1, m.num_loops + 1)
    assert recorder.layers == [(loop, 1) for loop in loops for _ in range(m.num_layers)]


@torch.no_grad()
@pytest.mark.parametrize("name", ["plt3_normed", "clp", "shared"])
def test_hidden_states_of_a_decoded_slot(name):
    """They are asked for loop by loop, so loops run one after another then."""
    m = small_model(name)
    _, model = pair(m)
    x = tokens(2, 9)
    expected = model(x, output_hidden_states=True).hidden_states
    cache = model(x[:, :8], use_cache=True).past_key_values
    found = model(x[:, 8:], past_key_values=cache, output_hidden_states=True).hidden_states
    for a, b in zip(expected, found, strict=True):
        assert (a[:, -1:] - b).abs().max() < BOUND


@torch.no_grad()
@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("sizes", [[40], [25, 2, 13]])
@pytest.mark.parametrize("name", MODELS)
def test_suffix_prefill_is_exact(name, sizes, outputs, monkeypatch):
    """At once and in chunks: the same last logits and the same cache as computing every slot."""
    monkeypatch.setattr(modeling_plt_moe, "WINDOW_CHUNK", 4)
    _, model = short_window(name)
    x = tokens(2, sum(sizes), seed=6)
    everything, suffix = (PLTMoECache(model.config) for _ in range(2))
    for piece in x.split(sizes, dim=1):
        full = model(piece, past_key_values=everything).logits
        kept = model(piece, past_key_values=suffix, logits_to_keep=outputs).logits
        assert (kept - full[:, -outputs:]).abs().max() < BOUND
        assert_same_cache(suffix, everything)
    without_cache = model(x, use_cache=False, logits_to_keep=outputs).logits
    assert (without_cache - full[:, -outputs:]).abs().max() < BOUND


@torch.no_grad()
@pytest.mark.parametrize("name", ["plt3_normed", "plt2", "shared", "plt2_no_shift", "clp"])
def test_later_loops_run_over_their_last_slots_only(name, monkeypatch):
    """(L - l + 1)(N (w - 1) + 1) slots for one output, as proven; all where nothing is shared."""
    m = small_model(name, **(SHORT_WINDOW if MODELS[name].get("gated_swa") else {}))
    _, model = short_window(name)
    recorder = Recorder(model, monkeypatch)
    model(tokens(1, 40), logits_to_keep=1)
    rows = dict(recorder.layers)
    reach = m.num_layers * (m.window_keys - 1) if m.gated_swa else 0
    for loop in range(2, m.num_loops + 1):
        expected = 40
        if m.share_first_loop_kv:
            expected = (m.num_loops - loop) * (reach + m.cross_loop_shift) + reach + 1
            assert expected == slots_needed(model.config, loop, 1)
        assert rows[loop] == expected
    assert rows[1] == 40


@torch.no_grad()
@pytest.mark.parametrize("name", ["plt3_normed", "shared", "plt2_no_shift", "dense_plt3_normed"])
def test_suffix_prefill_of_a_padded_batch(name):
    _, model = short_window(name)
    ids, mask = left_padded([tokens(1, s, seed=s) for s in (30, 4, 1, 17)])
    full = model(ids, attention_mask=mask, use_cache=True)
    kept = model(ids, attention_mask=mask, use_cache=True, logits_to_keep=2)
    real = mask[:, -2:].bool()
    assert (full.logits[:, -2:] - kept.logits)[real].abs().max() < BOUND
    more = torch.cat([mask, torch.ones(4, 1, dtype=torch.long)], 1)
    a, b = (
        model(tokens(4, 1), attention_mask=more, past_key_values=out.past_key_values).logits
        for out in (full, kept)
    )
    assert (a - b).abs().max() < BOUND


@torch.no_grad()
@pytest.mark.parametrize("name", ["plt3_normed", "vanilla"])
@pytest.mark.parametrize("first", [6, 20, 26])
def test_suffix_prefill_of_packed_documents_and_what_follows(name, first):
    """The last document may begin inside or outside the suffix; what follows belongs to it."""
    _, model = short_window(name)
    a, b = tokens(1, first, seed=2), tokens(1, 27 - first, seed=3)
    positions = torch.cat([torch.arange(first), torch.arange(27 - first)])[None]
    out = model(torch.cat([a, b], 1), position_ids=positions, logits_to_keep=1, use_cache=True)
    more = tokens(1, 4, seed=4)
    expected = model(torch.cat([b, more], 1)).logits
    assert (out.logits - expected[:, 26 - first : 27 - first]).abs().max() < BOUND
    after = torch.arange(27 - first, 31 - first)[None]
    cache, given = out.past_key_values, {"position_ids": after}
    assert (model(more, past_key_values=cache, **given).logits - expected[:, -4:]).abs().max() < (
        BOUND
    )
    alone = PLTMoECache(model.config)  # the second document begins a later call
    model(a, past_key_values=alone)
    given = {"position_ids": positions[:, first:], "past_key_values": alone}
    assert (model(b, **given).logits - expected[:, : 27 - first]).abs().max() < BOUND


@pytest.mark.parametrize("name", ["plt3_normed", "dense_plt2", "loop2"])
def test_suffix_has_the_gradients_of_the_whole(name):
    """What the last logits do not depend on has no gradient anyway, so training may use it too."""
    _, model = short_window(name)
    x, grads = tokens(2, 30), []
    for options in ({}, {"logits_to_keep": 2}):
        model.zero_grad()
        model(x, use_cache=False, **options).logits[:, -2:].square().mean().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for a, b in zip(*grads, strict=True):
        assert (a - b).abs().max() < BOUND
