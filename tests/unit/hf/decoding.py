"""What tests of generate() and of the cache share."""

import torch

from tests.unit.hf.models import MODELS, pair, small_model

BOUND = 1e-12
"""Rounding of float64: sums run in another order."""
SHORT_WINDOW = {"window_keys": 3}
NEW_TOKENS = 7


def assert_greedy(reference, prompt, generated):
    """Check that the reference, which knows no cache, would have chosen the same tokens."""
    logits = reference(torch.cat([prompt, generated], 1)).logits
    chosen = logits[:, prompt.size(1) - 1 : -1].argmax(-1)
    assert torch.equal(chosen, generated)


def left_padded(prompts, pad=0):
    """Return ids and mask of prompts [1, s] of different lengths, padded on the left."""
    longest = max(p.size(1) for p in prompts)
    ids = [torch.nn.functional.pad(p, (longest - p.size(1), 0), value=pad) for p in prompts]
    mask = [torch.arange(longest)[None] >= longest - p.size(1) for p in prompts]
    return torch.cat(ids), torch.cat(mask).long()


def generate(model, ids, **options):
    defaults = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
    out = model.generate(ids, **(defaults | {"eos_token_id": None} | options))
    return out[:, ids.size(1) :]


def short_window(name):
    """Return the pair ``name`` whose later loops reach 4 slots back."""
    changes = SHORT_WINDOW if MODELS[name].get("gated_swa") else {}
    return pair(small_model(name, **changes))


def assert_same_cache(found, expected):
    for a, b in zip(found.layers, expected.layers, strict=True):
        assert (a.keys - b.keys).abs().max() < BOUND if b.keys.numel() else True
        assert a.values.shape == b.values.shape
        assert not b.values.numel() or (a.values - b.values).abs().max() < BOUND
    for a, b in zip(found.last_hidden, expected.last_hidden, strict=True):
        assert (a is b is None) or (a - b).abs().max() < BOUND
