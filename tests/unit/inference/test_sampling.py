"""Choosing tokens: the right distribution, and the same draw whatever else is in the batch."""

import pytest
import torch

from pltmoe.errors import ConfigError
from pltmoe.inference import sampling
from pltmoe.inference.sampling import Sampler, SamplingOptions, uniform

VOCABULARY = 50


def choose(logits, options, slots=None, logprobs=False):
    sampler = Sampler(len(options), logits.size(1), torch.device("cpu"))
    plan = sampler.set(options, logprobs)
    slots = torch.arange(len(options)) if slots is None else torch.tensor(slots)
    return sampler.choose(logits, slots, plan)


def random_logits(b, seed=0):
    return 2 * torch.randn(b, VOCABULARY, generator=torch.Generator().manual_seed(seed))


def test_uniform_numbers_are_uniform_and_unrelated():
    x = uniform(torch.arange(300)[:, None], torch.arange(300)[None])
    assert x.min() >= 0 and x.max() < 1
    assert abs(x.mean() - 0.5) < 0.005
    assert (torch.histc(x, 20, 0, 1) / x.numel() - 0.05).abs().max() < 0.003
    assert torch.corrcoef(torch.stack([x[:, :-1].flatten(), x[:, 1:].flatten()]))[0, 1] < 0.01
    assert torch.corrcoef(torch.stack([x[:-1].flatten(), x[1:].flatten()]))[0, 1] < 0.01
    assert x.unique().numel() > 0.99 * x.numel()


def test_greedy_takes_the_largest():
    logits = random_logits(4)
    token, logprob = choose(logits, [SamplingOptions()] * 4, logprobs=True)
    assert torch.equal(token, logits.argmax(-1))
    assert torch.allclose(logprob, logits.log_softmax(-1).max(-1).values)
    for cold in (1e-6, 1e-38, 5e-324):
        token, _ = choose(logits, [SamplingOptions(temperature=cold)] * 4)
        assert torch.equal(token, logits.argmax(-1))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_frequencies_are_the_softmax_at_that_temperature(temperature):
    draws = 20_000
    logits = random_logits(1).expand(draws, -1)
    options = [SamplingOptions(temperature=temperature, seed=7)] * draws
    token, _ = choose(logits, options, range(draws))
    found = token.bincount(minlength=VOCABULARY) / draws
    expected = (logits[0] / temperature).softmax(-1)
    assert (found - expected).abs().max() < 0.015


def test_top_k_and_top_p_keep_what_they_say():
    draws = 3000
    logits = random_logits(1, seed=3).expand(draws, -1)
    order = logits[0].argsort(descending=True).tolist()
    below = logits[0].softmax(-1)[order].cumsum(-1)
    nucleus = int((below < 0.8).sum()) + 1
    for options, kept in (
        (SamplingOptions(temperature=2.0, top_k=5), set(order[:5])),
        (SamplingOptions(temperature=1.0, top_p=0.8), set(order[:nucleus])),
        (SamplingOptions(temperature=2.0, top_p=1e-6), {order[0]}),
        (SamplingOptions(temperature=4.0, top_k=1000), set(order)),
    ):
        token, _ = choose(logits, [options] * draws, range(draws))
        assert set(token.tolist()) == kept
    # top_p counts what top_k has left: of the two likeliest, renormalised.
    both = SamplingOptions(temperature=1.0, top_k=2, top_p=0.01)
    token, _ = choose(logits, [both] * draws, range(draws))
    assert set(token.tolist()) == {order[0]}


def test_the_smallest_draw_is_a_token_that_may_be_chosen(monkeypatch):
    monkeypatch.setattr(sampling, "uniform", lambda seed_b, slot_b: torch.zeros(len(seed_b)))
    token, _ = choose(torch.tensor([[0.0, 1.0, 2.0]]), [SamplingOptions(temperature=1.0, top_k=2)])
    assert token == 1


def test_log_probabilities_are_the_models_whatever_the_options():
    logits = random_logits(1)
    options = SamplingOptions(temperature=3.0, top_k=2)
    token, logprob = choose(logits, [options], logprobs=True)
    assert torch.allclose(logprob, logits.log_softmax(-1)[0, token])


def test_a_draw_does_not_depend_on_the_rest_of_the_batch():
    """Neighbours decide which of the computations runs: greedy, all, top-k, full sort."""
    mine = [
        SamplingOptions(temperature=1.0, seed=1),
        SamplingOptions(temperature=0.8, top_k=7, seed=2),
        SamplingOptions(temperature=1.5, top_p=0.7, seed=3),
        SamplingOptions(seed=4),
        SamplingOptions(temperature=1.0, top_k=3, top_p=0.5, seed=2**63 + 5),
    ]
    for seed in range(40):
        logits = random_logits(5, seed)
        together, _ = choose(logits, mine, [seed] * 5)
        for i in range(5):
            alone, _ = choose(logits[i : i + 1], mine[i : i + 1], [seed])
            assert alone[0] == together[i]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, r"max_new_tokens \(0\) must be at least 1"),
        ({"temperature": -1.0}, r"temperature \(-1.0\) must be 0 or more"),
        ({"temperature": float("nan")}, "must be 0 or more"),
        ({"top_k": -1}, r"top_k \(-1\) must be 0 \(all tokens\) or more"),
        ({"top_p": 0.0}, r"top_p \(0.0\) must be over 0 and at most 1"),
        ({"top_p": 1.5}, "must be over 0 and at most 1"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ConfigError, match=message):
        SamplingOptions(**options)


def test_limits_that_differ_little_share_one_plan() -> None:
    """Each plan is a CUDA graph."""
    sampler = Sampler(2, 100, torch.device("cpu"))
    plans = set()
    for top_k in (5, 6, 7, 8, 70, 99):
        options = SamplingOptions(temperature=1.0, top_k=top_k)
        plans.add(sampler.set([options, SamplingOptions(temperature=1.0, top_k=3)]).candidates)
    assert plans == {8, 100}
