"""One-pass decoding and suffix prefill equal the reference in float64, in every variant."""

import pytest
import torch

from pltmoe.config.counts import kv_cache_bytes
from pltmoe.errors import DataError
from pltmoe.inference import prefill as prefill_module
from pltmoe.inference.cache import StaticCache
from pltmoe.inference.model import PLTDecoder
from pltmoe.inference.prefill import cut_back, prefill, slots_needed
from tests.unit.hf.models import tokens
from tests.unit.inference.models import NAMES, cache_of, kept, model, pair

NUM_SLOTS = 30  # the suffixes of all small models with a window of 4 are shorter
EXACT = 1e-12


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return (found - expected).abs().max() < EXACT * max(1.0, float(expected.abs().max()))


def decode_all(decoder, cache, x_bs):
    return torch.stack([decoder.step(x_b, cache) for x_b in x_bs.unbind(1)], 1)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_decoding_equals_the_reference(name):
    reference, decoder = pair(name)
    x = tokens(2, NUM_SLOTS)
    assert close(decode_all(decoder, cache_of(decoder, 2), x), reference(x).logits)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_suffix_prefill_leaves_the_logits_and_the_cache_of_decoding(name):
    """Unequal lengths; later loops run over their suffix only (the longest prompt has more)."""
    reference, decoder = pair(name)
    x = tokens(3, NUM_SLOTS)
    lengths = [NUM_SLOTS, 1, 17]
    cache = cache_of(decoder, 3)
    found = prefill(decoder, cache, [x[i, :n].tolist() for i, n in enumerate(lengths)])
    assert cache.lengths_b.tolist() == lengths
    for index, n in enumerate(lengths):
        assert close(found[index], reference(x[index : index + 1, :n]).logits[0, -1])
        slow = cache_of(decoder, 1)
        decode_all(decoder, slow, x[index : index + 1, :n])
        for fast, expected in zip(kept(cache, index), kept(slow, 0), strict=True):
            assert fast.shape == expected.shape
            assert fast.numel() == 0 or close(fast, expected)


@pytest.mark.parametrize(
    "name", ["plt2", "plt3_normed", "clp3_normed", "loop3", "plt3_normed_routing"]
)
@torch.no_grad()
def test_prefill_in_pieces_and_after_decoding(name):
    """Chunks of 7 rows, a prompt added to what is there, decoding from unequal lengths."""
    reference, decoder = pair(name)
    x = tokens(2, NUM_SLOTS)
    expected = reference(x).logits
    cache = cache_of(decoder, 2)
    prefill(decoder, cache, [x[0, :11].tolist(), x[1, :2].tolist()], chunk_slots=7)
    for step in range(3):
        found = decoder.step(torch.stack([x[0, 11 + step], x[1, 2 + step]]), cache)
        assert close(found, torch.stack([expected[0, 11 + step], expected[1, 2 + step]]))
    rest = [x[0, 14:].tolist(), x[1, 5:].tolist()]
    found = prefill(decoder, cache, rest, outputs=4, chunk_slots=7)
    assert close(found, expected[:, -4:])


@pytest.mark.parametrize("name", [n for n in NAMES if not n.startswith("dense")])
@torch.no_grad()
def test_cutting_back_is_exact(name):
    reference, decoder = pair(name)
    x, cache = tokens(2, NUM_SLOTS), cache_of(pair(name)[1], 2)
    prefill(decoder, cache, x.tolist())
    for length in (25, 9, 1):
        cut_back(decoder, cache, x.tolist(), length)
        found = decode_all(decoder, cache, x[:, length:])
        assert close(found, reference(x).logits[:, length:])
    cut_back(decoder, cache, x.tolist(), 0)
    assert close(decode_all(decoder, cache, x), reference(x).logits)


@torch.no_grad()
def test_later_loops_run_over_the_suffix_only(monkeypatch):
    """2 layers with 4 keys: 2 * 3 + 1 slots of loop 3, then 2 * 3 + 1 more for each loop before."""
    _, decoder = pair("plt3")
    assert slots_needed(decoder.m) == [None, 14, 7]
    seen = []
    stack = prefill_module._Prefill._stack

    def count(self, loop, chunk, x_td, *others):
        seen.append((loop, x_td.size(0)))
        assert not torch.backends.cuda.cudnn_sdp_enabled(), "it makes a plan for every new length"
        return stack(self, loop, chunk, x_td, *others)

    monkeypatch.setattr(prefill_module._Prefill, "_stack", count)
    prefill(decoder, cache_of(decoder, 1), tokens(1, 40).tolist())
    assert seen == [(1, 40), (2, 14), (3, 7)]
    assert torch.backends.cuda.cudnn_sdp_enabled()


@torch.no_grad()
def test_each_layer_leaves_out_what_no_later_layer_needs(monkeypatch):
    """Outputs needed: 7 + 1 of loop 2, 1 of loop 3; before each layer 3 more (window of 4)."""
    reference, decoder = pair("plt3")
    seen = []
    feed_forward = decoder._feed_forward

    def count(x_td, *others):
        seen.append(x_td.size(0))
        return feed_forward(x_td, *others)

    monkeypatch.setattr(decoder, "_feed_forward", count)
    x = tokens(1, 40)
    found = prefill(decoder, cache_of(decoder, 1), x.tolist())
    assert seen == [40, 40, 11, 8, 4, 1]
    assert close(found[0], reference(x).logits[0, -1])


@pytest.mark.parametrize("changed", [0, 1])
@torch.no_grad()
def test_the_suffix_is_as_short_as_it_can_be(monkeypatch, changed):
    """One slot less in loop 2 or 3 changes what is kept: the count is neither safe nor short."""
    reference, decoder = pair("plt3")
    x = tokens(1, 40)

    def too_few(m, outputs=1, keys_cached=False):
        needed = slots_needed(m, outputs, keys_cached)
        needed[1 + changed] -= 1
        return needed

    cache, broken = cache_of(decoder, 1), cache_of(decoder, 1)
    prefill(decoder, cache, x.tolist())
    monkeypatch.setattr(prefill_module, "slots_needed", too_few)
    found = prefill(decoder, broken, x.tolist())
    assert not close(found[0], reference(x).logits[0, -1])


@torch.no_grad()
def test_reorder_and_reset():
    reference, decoder = pair("plt3_normed")
    x, cache = tokens(3, 20), cache_of(decoder, 3)
    expected = reference(x).logits
    prefill(decoder, cache, [x[0, :12].tolist(), x[1, :7].tolist(), x[2, :9].tolist()])
    cache.reorder(torch.tensor([2, 0, 0]))
    found = decoder.step(torch.stack([x[2, 9], x[0, 12], x[0, 12]]), cache)
    assert close(found, torch.stack([expected[2, 9], expected[0, 12], expected[0, 12]]))
    cache.reset()
    assert close(decode_all(decoder, cache, x), expected)


@pytest.mark.parametrize("capacity", [3, 40])
@pytest.mark.parametrize("name", NAMES)
def test_bytes_are_those_of_the_formula(name, capacity):
    m = model(name)
    cache = StaticCache(m, 5, capacity, "cpu", torch.bfloat16)
    assert cache.num_bytes() == 5 * kv_cache_bytes(m, capacity)


@torch.no_grad()
def test_a_full_cache_harms_no_neighbour():
    """A finished sequence that goes on past its capacity overwrites itself only."""
    reference, decoder = pair("plt2")
    x, cache = tokens(2, 12), cache_of(decoder, 2, capacity=8)
    prefill(decoder, cache, [x[0, :8].tolist(), x[1, :2].tolist()])
    for slot in range(2, 8):
        found = decoder.step(torch.stack([x[0, slot], x[1, slot]]), cache)
        assert close(found[1], reference(x).logits[1, slot])
    assert cache.lengths_b.tolist() == [8, 8]


@torch.no_grad()
def test_prompts_that_do_not_fit_are_refused():
    _, decoder = pair("plt2")
    cache = cache_of(decoder, 2, capacity=8)
    for prompts, message in (
        ([[1, 2]], "1 prompts for a cache of 2 sequences"),
        ([[1], []], "prompt 2 is empty or too short: 0 tokens"),
        ([[1], [1] * 9], "prompt 2 needs 9 slots, but the cache has 8: make it larger"),
    ):
        with pytest.raises(DataError, match=message):
            prefill(decoder, cache, prompts)
    prefill(decoder, cache, [[1, 2], [1, 2, 3]])
    with pytest.raises(DataError, match="the cache cannot be cut back to 3 slots"):
        cut_back(decoder, cache, [[1, 2], [1, 2, 3]], 3)


@pytest.mark.parametrize("name", ["plt3_normed", "plt2_gate_hidden"])
@torch.no_grad()
def test_rows_compile_whole(monkeypatch, name):
    """torch.compile takes in what a row computes without a break; here without generating code."""
    whole = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **o: whole(f, backend="eager", **o))
    reference, decoder = pair(name)
    fused = PLTDecoder(decoder.weights, 64, fuse=True)
    x = tokens(2, 6)
    assert close(decode_all(fused, cache_of(decoder, 2), x), reference(x).logits)
