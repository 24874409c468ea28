"""Taking slots back: crop() of any number, and decoding with guesses, which depends on it."""

import copy

import pytest
import torch

from pltmoe.hf.modeling_plt_moe import PLTMoECache
from tests.unit.hf.decoding import (
    BOUND,
    assert_greedy,
    assert_same_cache,
    generate,
    left_padded,
    short_window,
)
from tests.unit.hf.models import EVERY_KIND, pair, small_model, tokens


@torch.no_grad()
@pytest.mark.parametrize("recording", [False, True])
@pytest.mark.parametrize("name", EVERY_KIND)
def test_crop_of_any_number_of_slots_leaves_no_trace(name, recording):
    _, model = short_window(name)
    x, more = tokens(2, 24, seed=1), tokens(2, 5, seed=2)
    for dropped in (0, 1, 5, 13, 24):
        cache = PLTMoECache(model.config)
        if recording:
            cache.activate_past_recording()
        model(x[:, :18], past_key_values=cache, logits_to_keep=1)
        for slot in range(18, 24):
            model(x[:, slot : slot + 1], past_key_values=cache)
        cache.crop(-dropped)
        assert cache.get_seq_length() == 24 - dropped
        seen = torch.cat([x[:, : 24 - dropped], more], 1)
        for piece in (more[:, :1], more[:, 1:4], more[:, 4:]):
            logits = model(piece, past_key_values=cache).logits
        assert (logits - model(seen).logits[:, -1:]).abs().max() < BOUND
        fresh = model(seen, use_cache=True).past_key_values
        kept = copy.deepcopy(cache)
        kept.crop(0)
        assert_same_cache(kept, fresh)
        again = min(7, seen.size(1))  # more than was recorded since the crop
        cache.crop(-again)
        logits = model(more, past_key_values=cache).logits
        seen = torch.cat([seen[:, : seen.size(1) - again], more], 1)
        assert (logits - model(seen).logits[:, -5:]).abs().max() < BOUND


@torch.no_grad()
@pytest.mark.parametrize("name", ["plt3_normed", "clp3_normed", "shared"])
def test_crop_again_reorder_and_select_before_the_next_call(name):
    _, model = short_window(name)
    x, cache = tokens(3, 24), PLTMoECache(model.config)
    model(x, past_key_values=cache)
    cache.crop(-2)
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    cache.crop(-4)
    cache.batch_select_indices(torch.tensor([0, 2]))
    cache.batch_repeat_interleave(2)
    cache.crop(0)
    more = tokens(4, 2, seed=9)
    logits = model(more, past_key_values=cache).logits
    seen = torch.cat([x[[2, 2, 1, 1], :18], more], 1)
    assert (logits - model(seen).logits[:, -2:]).abs().max() < BOUND


@torch.no_grad()
@pytest.mark.parametrize("name", ["plt3_normed", "clp3_normed"])
def test_crop_of_a_padded_batch(name):
    _, model = short_window(name)
    prompts = [tokens(1, s, seed=s) for s in (20, 3, 11)]
    ids, mask = left_padded(prompts)
    cache = PLTMoECache(model.config)
    model(ids, attention_mask=mask, past_key_values=cache)
    cache.crop(-2)
    more = tokens(3, 3, seed=5)
    mask = torch.cat([mask[:, :-2], torch.ones_like(more)], 1)
    logits = model(more, attention_mask=mask, past_key_values=cache).logits
    for row, prompt in enumerate(prompts):
        alone = torch.cat([prompt[:, :-2], more[row : row + 1]], 1)
        assert (logits[row] - model(alone).logits[0, -3:]).abs().max() < BOUND


@torch.no_grad()
def test_crop_after_packed_documents():
    _, model = short_window("plt3_normed")
    x = tokens(1, 27)
    positions = torch.cat([torch.arange(20), torch.arange(7)])[None]
    cache = PLTMoECache(model.config)
    model(x, position_ids=positions, past_key_values=cache)
    cache.crop(-3)
    logits = model(x[:, 24:], position_ids=positions[:, 24:], past_key_values=cache).logits
    assert (logits - model(x[:, 20:]).logits[:, -3:]).abs().max() < BOUND


@torch.no_grad()
@pytest.mark.parametrize("name", EVERY_KIND)
def test_prompt_lookup_gives_the_greedy_tokens(name):
    reference, model = pair(small_model(name))
    prompt = tokens(1, 5).repeat(1, 4)
    guessed = generate(model, prompt, prompt_lookup_num_tokens=3, max_new_tokens=12)
    assert_greedy(reference, prompt, guessed)


@torch.no_grad()
@pytest.mark.parametrize("name", ["plt3_normed", "clp"])
def test_an_assistant_with_loops_guesses_for_a_model_with_loops(name):
    reference, model = pair(small_model(name))
    _, assistant = pair(small_model("dense_plt2"), seed=1)
    prompt = tokens(1, 9)
    for helper in (assistant, model):
        guessed = generate(model, prompt, assistant_model=helper, max_new_tokens=12)
        assert_greedy(reference, prompt, guessed)


@torch.no_grad()
def test_recording_keeps_what_a_crop_takes_back_and_no_more():
    """No slot is computed again after a crop of what was recorded; crop(0) ends the keeping."""
    _, model = short_window("plt3_normed")
    cache, x = PLTMoECache(model.config), tokens(1, 30)
    model(x[:, :20], past_key_values=cache, logits_to_keep=1)
    smallest = cache.num_bytes() - cache.paper_bytes()
    cache.activate_past_recording()
    model(x[:, 20:], past_key_values=cache)
    assert cache.num_bytes() - cache.paper_bytes() > smallest
    cache.crop(-9)
    assert cache.missing == 0
    assert cache.num_bytes() - cache.paper_bytes() == smallest
    cache.crop(-1)
    assert cache.missing > 0


@torch.no_grad()
def test_what_cannot_be_cropped_is_refused():
    _, model = short_window("plt2")
    cache = PLTMoECache(model.config)
    model(inputs_embeds=model.model.embed_tokens(tokens(1, 6)), past_key_values=cache)
    with pytest.raises(ValueError, match="were given as inputs_embeds; give input_ids"):
        cache.crop(-1)
    with pytest.raises(ValueError, match="of a cache of 6 slots"):
        cache.crop(-7)
