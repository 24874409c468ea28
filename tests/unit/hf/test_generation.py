"""generate() with cache equals computing everything again for every token."""

import pytest
import torch
from transformers import DynamicCache

from pltmoe.hf import modeling_plt_moe
from pltmoe.hf.modeling_plt_moe import PLTMoECache, PLTMoEModel
from tests.unit.hf.decoding import assert_greedy, generate, left_padded
from tests.unit.hf.models import ABLATION, EVERY_KIND, MODELS, pair, small_model, tokens


@pytest.fixture(autouse=True)
def short_pieces(monkeypatch):
    """Cut even these short texts into several pieces of the window, as long ones are."""
    monkeypatch.setattr(modeling_plt_moe, "WINDOW_CHUNK", 4)


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_greedy_with_and_without_cache(name):
    reference, model = pair(small_model(name))
    prompt = tokens(1, 6)
    generated = generate(model, prompt)
    assert_greedy(reference, prompt, generated)
    assert torch.equal(generate(model, prompt, use_cache=False), generated)


@torch.no_grad()
@pytest.mark.parametrize("name", EVERY_KIND)
def test_a_left_padded_batch_generates_what_each_row_does_alone(name):
    """Padding is not attended to, positions and the shift begin at the first real token.

    The longest prompt is longer than what the later loops run over.
    """
    reference, model = pair(small_model(name))
    prompts = [tokens(1, s, seed=s) for s in (23, 1, 4)]
    ids, mask = left_padded(prompts)
    generated = generate(model, ids, attention_mask=mask)
    for prompt, row in zip(prompts, generated, strict=True):
        assert_greedy(reference, prompt, row[None])
    assert torch.equal(generate(model, ids, attention_mask=mask, use_cache=False), generated)
    for size in (3, 20):
        chunked = generate(model, ids, attention_mask=mask, prefill_chunk_size=size)
        assert torch.equal(chunked, generated)


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("sizes", [[13], [5, 8], [1] * 13, [6, 1, 1, 4, 1]])
@pytest.mark.parametrize("name", ["vanilla", "loop3", "clp3_normed", "shared", "plt3_normed"])
def test_logits_do_not_depend_on_how_the_tokens_are_fed(name, sizes, padded):
    """Prefill at once, in chunks, token by token: the same logits (float64, 1e-12)."""
    reference, model = pair(small_model(name))
    prompts = [tokens(1, 13, seed=3), tokens(1, 9 if padded else 13, seed=4)]
    ids, mask = left_padded(prompts)
    cache, logits, seen = PLTMoECache(model.config), [], 0
    for size in sizes:
        seen += size
        given = {"attention_mask": mask[:, :seen]} if padded else {}
        out = model(ids[:, seen - size : seen], past_key_values=cache, **given)
        logits.append(out.logits)
    assert out.past_key_values is cache
    for row, prompt in enumerate(prompts):
        expected = reference(prompt).logits[0]
        got = torch.cat(logits, 1)[row, -prompt.size(1) :]
        assert (got - expected).abs().max() < 1e-12


@torch.no_grad()
@pytest.mark.parametrize("name", ["plt3_normed", "loop2"])
def test_padding_tokens_change_nothing(name):
    _, model = pair(small_model(name))
    ids, mask = left_padded([tokens(1, 9), tokens(1, 4)])
    other = torch.where(mask.bool(), ids, 33)
    for padding in (ids, other):
        assert torch.isfinite(model(padding, attention_mask=mask).logits).all()
    difference = model(ids, attention_mask=mask).logits - model(other, attention_mask=mask).logits
    assert difference[mask.bool()].abs().max() < 1e-12


@torch.no_grad()
def test_positions_of_ones_own_do_not_carry_the_shift_out_of_padding():
    """The first real token is known from the mask, whatever its position.

    Without a gate (which reads the rotated query) only distances matter, up to the rounding of
    float32 angles; without a router that rounding cannot choose other experts.
    """
    _, model = pair(small_model("dense_vanilla", num_loops=2, cross_loop_shift=True))
    ids, mask = left_padded([tokens(1, 9), tokens(1, 4)])
    expected = model(ids, attention_mask=mask).logits
    positions = torch.arange(5, 14)[None]
    found = model(ids, attention_mask=mask, position_ids=positions).logits
    assert (found - expected)[mask.bool()].abs().max() < 1e-5


def test_positions_come_from_the_mask():
    valid = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]).bool()
    positions = PLTMoEModel._positions(None, valid, 3, torch.zeros(2, 2, 1))
    assert positions.tolist() == [[1, 2], [3, 4]]


@torch.no_grad()
def test_right_padding_leaves_real_tokens_alone():
    reference, model = pair(small_model("plt3_normed"))
    prompt = tokens(1, 5)
    ids = torch.cat([torch.nn.functional.pad(prompt, (0, 4)), tokens(1, 9)])
    mask = torch.tensor([[1] * 5 + [0] * 4, [1] * 9])
    logits = model(ids, attention_mask=mask).logits
    assert (logits[:1, :5] - reference(prompt).logits).abs().max() < 1e-12


@torch.no_grad()
@pytest.mark.parametrize("name", EVERY_KIND)
def test_beam_search_reorders_every_part_of_the_cache(name):
    _, model = pair(small_model(name))
    prompt = tokens(2, 19)
    options = {"num_beams": 3, "attention_mask": torch.ones_like(prompt)}
    with_cache = generate(model, prompt, **options)
    assert torch.equal(with_cache, generate(model, prompt, use_cache=False, **options))


@torch.no_grad()
@pytest.mark.parametrize("name", [*ABLATION, "plt2_window_of_one"])
def test_cache_repeats_and_selects_sequences(name):
    _, model = pair(small_model(name))
    ids, more = tokens(2, 6), tokens(4, 3, seed=9)
    cache = PLTMoECache(model.config)
    model(ids, past_key_values=cache)
    cache.batch_repeat_interleave(2)
    out = model(more, past_key_values=cache).logits
    expected = model(torch.cat([ids.repeat_interleave(2, 0), more], 1)).logits[:, -3:]
    assert (out - expected).abs().max() < 1e-12
    cache.batch_select_indices(torch.tensor([3, 1]))
    out = model(more[:2], past_key_values=cache).logits
    full = torch.cat([ids[[1, 0]], more[[3, 1]], more[:2]], 1)
    assert (out - model(full).logits[:, -3:]).abs().max() < 1e-12
    cache.reset()
    assert torch.allclose(model(ids, past_key_values=cache).logits, model(ids).logits)


@torch.no_grad()
def test_a_reset_cache_hands_nothing_on():
    """Not even where positions of one's own do not say that a document begins."""
    _, model = pair(small_model("plt3_normed"))
    ids, positions = tokens(1, 9), torch.arange(5, 14)[None]
    expected = model(ids, position_ids=positions, use_cache=False).logits
    cache = PLTMoECache(model.config)
    model(tokens(1, 6), past_key_values=cache)
    cache.reset()
    found = model(ids, position_ids=positions, past_key_values=cache).logits
    assert (found - expected).abs().max() < 1e-12


@torch.no_grad()
@pytest.mark.parametrize("name", EVERY_KIND)
def test_a_conversation_continues_in_the_same_cache(name):
    reference, model = pair(small_model(name))
    cache, prompt = PLTMoECache(model.config), tokens(1, 25)
    first = generate(model, prompt, past_key_values=cache)
    longer = torch.cat([prompt, first, tokens(1, 3, seed=5)], 1)
    assert_greedy(reference, longer, generate(model, longer, past_key_values=cache))


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "slots"),
    [("vanilla", 20), ("loop2", 40), ("clp", 40), ("shared", 20), ("plt2", 23), ("plt3", 26)],
)
def test_cache_size_is_the_papers(name, slots):
    """n d; 2 n d; .. ; n d + (L-1) w d, where the window's newest key comes with the query."""
    m = small_model(name)
    _, model = pair(m)
    cache = model(tokens(1, 20)).past_key_values
    elements = slots * m.num_layers * 2 * m.num_kv_heads * m.head_dim
    elements += (m.num_loops - 1) * m.hidden_size if m.cross_loop_shift else 0
    assert cache.num_bytes() == 8 * elements
    slot_bytes = 8 * m.num_layers * 2 * m.num_kv_heads * m.head_dim
    newest_of_windows = m.num_loops - 1 if m.gated_swa else 0
    assert cache.paper_bytes() == (slots + newest_of_windows) * slot_bytes


def test_what_the_cache_cannot_do_is_refused():
    _, model = pair(small_model("plt2"))
    prompt = tokens(1, 6)
    with pytest.raises(ValueError, match="DynamicCache; this model needs PLTMoECache"):
        model(prompt, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="cache_implementation='static' is not supported"):
        generate(model, prompt, cache_implementation="static")
