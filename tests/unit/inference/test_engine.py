"""The engine generates what decoding without any cache generates, batched, streamed, continued."""

import weakref

import pytest
import torch

from pltmoe.errors import ConfigError, DataError, EngineError
from pltmoe.inference.engine import Engine, Session
from pltmoe.inference.sampling import Sampler, SamplingOptions
from pltmoe.inference.weights import random_weights
from tests.unit.hf.models import random_reference, tokens
from tests.unit.inference.models import model, pair, weights_of

PROMPTS = [[5, 3, 8, 1, 9, 2, 7], [4], [6, 6, 1, 20, 33]]
DRAWN = [
    SamplingOptions(max_new_tokens=9, temperature=1.0, seed=1),
    SamplingOptions(max_new_tokens=6, temperature=1.2, top_k=9, seed=2),
    SamplingOptions(max_new_tokens=12, temperature=0.7, top_p=0.8, seed=3),
]


def engine(name="plt3_normed", **options):
    reference, _ = pair(name)
    return reference, Engine(weights_of(reference.m, reference.state_dict()), 64, **options)


@torch.no_grad()
def without_cache(reference, prompt, options):
    """Run the whole text again for every token."""
    text = list(prompt)
    sampler = Sampler(1, reference.m.vocab_size, torch.device("cpu"))
    plan = sampler.set([options])
    for _ in range(options.max_new_tokens):
        logits = reference(torch.tensor([text])).logits[:, -1]
        text.append(int(sampler.choose(logits, torch.tensor([len(text)]), plan)[0]))
    return text[len(prompt) :]


@pytest.mark.parametrize("name", ["plt3_normed", "loop2", "vanilla", "plt2_routing", "dense_plt2"])
def test_tokens_are_those_of_decoding_without_cache(name):
    reference, e = engine(name)
    greedy = SamplingOptions(max_new_tokens=8)
    for options in ([greedy] * 3, DRAWN):
        found = e.generate(PROMPTS, options)
        for prompt, wanted, text in zip(PROMPTS, options, found, strict=True):
            assert text.tokens == without_cache(reference, prompt, wanted)
            assert text.reason == "length"


def test_a_request_gets_the_same_tokens_alone_and_in_any_batch():
    _, e = engine()
    together = e.generate(PROMPTS, DRAWN)
    _, small = engine(max_batch=2)
    assert [g.tokens for g in small.generate(PROMPTS, DRAWN)] == [g.tokens for g in together]
    for prompt, options, expected in zip(PROMPTS, DRAWN, together, strict=True):
        assert e.generate([prompt], options)[0].tokens == expected.tokens


def test_continuing_a_finished_text_goes_on_as_if_it_had_not_stopped():
    _, e = engine()
    whole = e.generate(PROMPTS[:1], SamplingOptions(max_new_tokens=12, temperature=1.0, seed=4))
    first = e.generate(PROMPTS[:1], SamplingOptions(max_new_tokens=5, temperature=1.0, seed=4))
    rest = e.generate(
        [PROMPTS[0] + first[0].tokens],
        SamplingOptions(max_new_tokens=7, temperature=1.0, seed=4),
    )
    assert first[0].tokens + rest[0].tokens == whole[0].tokens


def test_stop_tokens_end_a_text_and_are_not_part_of_it():
    reference, e = engine()
    expected = without_cache(reference, PROMPTS[0], SamplingOptions(max_new_tokens=8))
    stop = expected[3]
    before = expected[: expected.index(stop)]
    found = e.generate(PROMPTS[:1], SamplingOptions(max_new_tokens=8, stop_ids=(stop,)))[0]
    assert (found.tokens, found.reason) == (before, "stop")
    own = Engine(e.decoder.weights, 64, stop_ids=[stop])
    assert own.generate(PROMPTS[:1], SamplingOptions(max_new_tokens=8))[0].tokens == before


def test_streaming_comes_step_by_step_and_can_be_stopped():
    _, e = engine()
    expected = e.generate(PROMPTS, SamplingOptions(max_new_tokens=6))
    stream = e.stream(PROMPTS, SamplingOptions(max_new_tokens=6))
    order, texts = [], [[], [], []]
    for new in stream:
        order.append(new.index)
        texts[new.index].append(new.token)
        if new.index == 1 and len(texts[1]) == 2:
            stream.stop(1)
    assert order == [0, 1, 2] * 2 + [0, 2] * 4
    assert texts[0] == expected[0].tokens and texts[1] == expected[1].tokens[:2]
    timing = stream.timing
    assert (timing.prompt_tokens, timing.new_tokens, timing.steps) == (13, 14, 5)
    assert timing.ms_per_token > 0 and timing.tokens_per_second > 0


def test_logprobs_are_the_models():
    reference, e = engine()
    found = e.generate(PROMPTS[:1], DRAWN[0], logprobs=True)[0]
    text = torch.tensor([PROMPTS[0] + found.tokens])
    expected = reference(text).logits.log_softmax(-1)[0, len(PROMPTS[0]) - 1 : -1]
    expected = expected.gather(-1, torch.tensor(found.tokens)[:, None])[:, 0]
    assert torch.allclose(torch.tensor(found.logprobs), expected.float(), atol=1e-5)


def test_sessions_are_kept_while_they_fit(caplog):
    caplog.set_level("INFO")
    _, e = engine()
    with e.session(1, 20) as one:
        pass
    with e.session(1, 60) as again, e.session(1, 20) as another:
        assert again is one and another is not one, "a session is its borrower's alone"
    del again, another
    gone = weakref.ref(one)
    del one
    with e.session(2, 60) as larger:
        assert larger.batch == 2
        assert gone() is None, "the old cache must be free before the new one is made"
    assert "attention and experts: plain PyTorch" in caplog.text
    assert "MiB for 2 sequences of 64 slots" in caplog.text


def test_streams_of_one_engine_do_not_touch_each_other():
    _, e = engine()
    options = SamplingOptions(max_new_tokens=8)
    expected = [e.generate([prompt], options)[0].tokens for prompt in PROMPTS]
    streams = [e.stream([prompt], options) for prompt in PROMPTS]
    together = [[new.token for new in step] for step in zip(*streams, strict=True)]
    assert [list(tokens) for tokens in zip(*together, strict=True)] == expected


def test_a_stream_that_is_dropped_gives_its_session_back():
    _, e = engine()
    stream = e.stream(PROMPTS[:1], SamplingOptions(max_new_tokens=5))
    next(stream)
    assert e._session is None
    del stream
    assert e._session is not None


def test_a_cache_longer_than_the_decoders_angles_is_refused():
    _, e = engine()
    with pytest.raises(EngineError, match="a cache of 65 slots for a model that is set to 64"):
        Session(e.decoder, 1, 65)


def test_fused_rows_compute_the_same():
    """torch.compile on a CPU; tests/gpu does it on a GPU."""
    reference, plain = engine("plt2")
    fused = Engine(weights_of(reference.m, reference.state_dict()), 64, fuse=True)
    options = SamplingOptions(max_new_tokens=6)
    found, expected = (e.generate(PROMPTS, options) for e in (fused, plain))
    assert [g.tokens for g in found] == [g.tokens for g in expected]


def test_pretended_context_decodes():
    m = model("plt2").model_copy(update={"moe_ffn_hidden_size": 16})
    session = Session(Engine(random_weights(m, "cpu", torch.bfloat16), 64).decoder, 2, 40)
    session.pretend_filled(30)
    session.step()
    assert session.cache.lengths_b.tolist() == [31, 31]
    assert torch.isfinite(session.cache.handed_on_bld).all()


@pytest.mark.parametrize(
    ("prompts", "changes", "error", "message"),
    [
        ([[1], []], {}, DataError, "prompt 2 is empty: give at least one token"),
        ([[1, 61]], {}, DataError, "a token outside of the model's vocabulary of 61"),
        ([[1] * 60], {}, DataError, r"need 69 slots, but the model is set to 64: shorten"),
        ([[1]], {"options": [DRAWN[0]] * 2}, ConfigError, "2 options for 1 prompts"),
    ],
)
def test_prompts_that_cannot_be_continued(prompts, changes, error, message):
    _, e = engine()
    with pytest.raises(error, match=message):
        e.generate(prompts, **({"options": DRAWN[0]} | changes))


@torch.no_grad()
def test_bfloat16_follows_float64_closely():
    reference = random_reference(model("plt2").model_copy(update={"moe_ffn_hidden_size": 16}))
    e = Engine(weights_of(reference.m, reference.state_dict(), dtype=torch.bfloat16), 64)
    session = Session(e.decoder, 2, 40)
    x = tokens(2, 20)
    session.begin(x.tolist())
    logits = e.decoder.step(x[:, 0], session.cache)
    expected = reference(torch.cat([x, x[:, :1]], 1)).logits[:, -1]
    assert logits.dtype == torch.bfloat16
    assert torch.corrcoef(torch.stack([logits.double().flatten(), expected.flatten()]))[0, 1] > 0.97
