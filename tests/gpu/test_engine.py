"""The engine on a GPU: graph, Triton kernels, FP8 and long prefills, against the plain CPU path."""

from typing import Any

import pytest
import torch

from pltmoe.config import load_config, model_from_dict
from pltmoe.inference.engine import Engine, Session
from pltmoe.inference.model import Kernels, PLTDecoder
from pltmoe.inference.prefill import prefill
from pltmoe.inference.sampling import SamplingOptions
from pltmoe.inference.weights import Weights, random_weights
from tests.configs import CLP, LOOP2, PLT2, PLT3
from tests.repository import CONFIGS

SLOTS = 512
LENGTHS = (3, 77, 200)
NAMES = ["plt2", "plt3", "loop2", "clp", "vanilla"]
LOOPS = {
    "vanilla": {},
    "loop2": LOOP2,
    "clp": CLP,
    "plt2": PLT2 | {"moe_loop_routing": "shared"},
    "plt3": PLT3 | {"normalize_per_loop": True, "hidden_scale": 0.5},
}


ALL_EXPERTS = {"moe_top_k": 16}
"""In bf16 a last digit may decide between two experts, and all that follows differs."""


def weights_on(
    device: str,
    name: str,
    dtype: torch.dtype = torch.float32,
    fp8: bool = False,
    **changes: Any,
) -> Weights:
    """Return the same random weights wherever they lie."""
    base = load_config(CONFIGS / "quickstart_vanilla.yaml").model.model_dump()
    model = model_from_dict(base | LOOPS[name] | changes)
    weights = random_weights(model, "cpu", dtype, fp8=fp8)
    for x in [weights, *weights.layers]:
        for key, value in vars(x).items():
            if isinstance(value, torch.Tensor):
                setattr(x, key, value.to(device))
    return weights


def prompts(vocab_size: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(vocab_size, (n,), generator=generator).tolist() for n in LENGTHS]


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_steps_in_a_graph_compute_what_the_cpu_computes(name: str) -> None:
    """float32, Triton kernels and the graph on one side, plain PyTorch on the other."""
    logits = []
    for device in ("cpu", "cuda"):
        engine = Engine(weights_on(device, name), SLOTS)
        text = prompts(engine.decoder.m.vocab_size)
        session = Session(engine.decoder, len(text), SLOTS)
        session.begin(text)
        for step in range(70):  # past the window
            session.token_b.fill_(step)
            session.step()
        assert session.cache.lengths_b.tolist() == [n + 70 for n in LENGTHS]
        logits.append(engine.decoder.step(session.token_b * 0 + 1, session.cache).cpu())
    assert (logits[0] - logits[1]).abs().max() < 1e-3 * logits[0].abs().max()


@pytest.mark.parametrize("name", ["plt2", "vanilla"])
def test_graph_and_no_graph_give_the_same_tokens(name: str) -> None:
    weights = weights_on("cuda", name, torch.bfloat16)
    decoder = Engine(weights, SLOTS).decoder
    drawn = [SamplingOptions(temperature=1.0, top_k=20, top_p=0.9, seed=s) for s in range(3)]
    found = []
    for graph in (False, True):
        session = Session(decoder, 3, SLOTS, graph=graph)
        for options in ([SamplingOptions()] * 3, drawn):  # two plans, two graphs
            session.set_options(options)
            session.begin(prompts(decoder.m.vocab_size))
            tokens = []
            for _ in range(20):
                session.step()
                tokens.append(session.token_b.tolist())
            found.append(tokens)
    assert found[:2] == found[2:]


def test_streams_read_one_step_behind_and_lose_nothing() -> None:
    engine = Engine(weights_on("cuda", "plt2"), SLOTS)
    text = prompts(engine.decoder.m.vocab_size)
    slow = Engine(weights_on("cpu", "plt2"), SLOTS)
    options = [SamplingOptions(max_new_tokens=n) for n in (1, 9, 30)]
    found, expected = engine.generate(text, options), slow.generate(text, options)
    assert [len(t.tokens) for t in found] == [1, 9, 30]
    assert [t.tokens[:5] for t in found] == [t.tokens[:5] for t in expected]


@torch.no_grad()
def test_prefill_in_pieces_equals_prefill_at_once() -> None:
    """Pieces attend with PyTorch's lower-right causal bias, the whole with its causal flag."""
    decoder = Engine(weights_on("cuda", "plt3", torch.bfloat16, **ALL_EXPERTS), 4096).decoder
    text = torch.randint(decoder.m.vocab_size, (1, 3000)).tolist()
    logits = []
    for chunk in (4096, 1000):
        session = Session(decoder, 1, 4096)
        logits.append(prefill(decoder, session.cache, text, chunk_slots=chunk).float())
    assert (logits[0] - logits[1]).abs().max() < 0.05 * logits[0].abs().max()


@torch.no_grad()
def test_fp8_experts_through_triton_equal_plain() -> None:
    weights = weights_on("cuda", "plt2", torch.bfloat16, fp8=True, **ALL_EXPERTS)
    logits = []
    for kernels in (Engine(weights, SLOTS).decoder.kernels, Kernels()):
        decoder = PLTDecoder(weights, SLOTS, kernels)
        session = Session(decoder, 3, SLOTS, graph=False)
        session.begin(prompts(decoder.m.vocab_size))
        logits.append(decoder.step(session.token_b * 0 + 1, session.cache).float())
    assert (logits[0] - logits[1]).abs().max() < 0.05 * logits[0].abs().max()


@torch.no_grad()
def test_fused_rows_equal_unfused_ones() -> None:
    weights = weights_on("cuda", "plt2")
    logits = []
    for fuse in (False, True):
        kernels = Engine(weights, SLOTS).decoder.kernels
        session = Session(PLTDecoder(weights, SLOTS, kernels, fuse=fuse), 3, SLOTS)
        session.begin(prompts(weights.model.vocab_size))
        session.token_b.fill_(5)
        session.step()
        logits.append(session.decoder.step(session.token_b * 0 + 1, session.cache))
    assert (logits[0] - logits[1]).abs().max() < 1e-3 * logits[0].abs().max()
