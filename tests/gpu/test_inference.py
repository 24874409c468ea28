"""The decode kernels on a GPU, in bf16 and float32, at small shapes and at the 1.7B/40B model's."""

import pytest
import torch

from pltmoe.inference import attention, experts
from pltmoe.inference.kernels import choose_kernels
from tests.unit.hf import models as hf
from tests.unit.inference.kernel_cases import (
    ATTENTION,
    CHOOSE,
    EXPERTS,
    PROJECT,
    SPLITS,
    attention_error,
    attention_inputs,
    choose_error,
    expert_error,
    expert_inputs,
    project_error,
    relative_error,
    store_error,
)

# bf16 keeps 8 bits of inputs and outputs; sums are in float32.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 0.02}
HEADLINE = {"L": 2, "h": 16, "g": 4, "k": 128, "n": 4352, "w": 64}
LOOPS_OF_THE_HEADLINE = ((1, 1), (1, 2), (4, 2), (64, 2), (256, 1), (256, 2), (256, 3))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("splits", SPLITS)
@pytest.mark.parametrize("name", ATTENTION)
def test_attention_equals_float64(name: str, splits: int, dtype: torch.dtype) -> None:
    assert attention_error(name, splits, "cuda", dtype) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", EXPERTS)
def test_experts_equal_float64(name: str, dtype: torch.dtype) -> None:
    assert expert_error(name, "cuda", dtype) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", PROJECT)
def test_projections_equal_float64(name: str, dtype: torch.dtype) -> None:
    assert project_error(name, "cuda", dtype) < 5 * TOLERANCE[dtype]


def test_choice_of_experts_and_stores_equal_the_plain_versions() -> None:
    assert all(choose_error(name, "cuda") < TOLERANCE[torch.float32] for name in CHOOSE)
    assert all(store_error(rings, "cuda", torch.bfloat16) == 0 for rings in (False, True))


@pytest.mark.parametrize("batch", [1, 16, 128])
def test_attention_of_the_headline_model(batch: int) -> None:
    lengths = tuple(torch.linspace(1, HEADLINE["n"], batch).int().tolist())
    inputs = attention_inputs("cuda", torch.bfloat16, **HEADLINE, lengths=lengths)
    plain = [x.nan_to_num() if x.is_floating_point() else x for x in inputs]
    fused = choose_kernels(torch.device("cuda", 0), torch.bfloat16).attention
    error = relative_error(fused(*inputs), attention.decode_attention(*plain))
    assert error < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("batch, loops", LOOPS_OF_THE_HEADLINE)
def test_experts_of_the_headline_model(batch: int, loops: int) -> None:
    inputs = expert_inputs("cuda", torch.bfloat16, t=batch * loops, e=256, top_k=8, d=2048, f=1024)
    plain = [x.nan_to_num() if x.is_floating_point() else x for x in inputs]
    fused = choose_kernels(torch.device("cuda", 0), torch.bfloat16).experts
    assert relative_error(fused(*inputs), experts.experts(*plain)) < TOLERANCE[torch.bfloat16]


def test_kernels_run_in_a_cuda_graph_and_repeat_bit_for_bit() -> None:
    """Launches depend on shapes only: new lengths and experts go through the same graph."""
    kernels = choose_kernels(torch.device("cuda", 0), torch.bfloat16)
    rows = list(attention_inputs("cuda", torch.bfloat16, **HEADLINE, lengths=(100, 4352)))
    rows[1:3] = [x.nan_to_num() for x in rows[1:3]]
    moe = list(expert_inputs("cuda", torch.bfloat16, t=4, e=64, top_k=8, d=256, f=128))
    moe[3:] = [x.nan_to_num() for x in moe[3:]]
    kernels.attention(*rows), kernels.experts(*moe)  # compile before capturing
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = kernels.attention(*rows), kernels.experts(*moe)
    rows[3].copy_(torch.tensor([4352, 7], device="cuda"))
    moe[1].copy_(moe[1].roll(1, 0))
    graph.replay()
    again = kernels.attention(*rows), kernels.experts(*moe)
    for got, expected in zip(captured, again, strict=True):
        assert torch.equal(got, expected)


@torch.no_grad()
def test_experts_of_an_exported_model_in_grouped_products() -> None:
    """As transformers runs them on a GPU, beside float64 on the CPU."""
    m = hf.small_model("plt3_shared_routing", moe_ffn_hidden_size=16)
    _, exact = hf.pair(m)
    model = hf.hf_model(m, dtype=torch.bfloat16).to("cuda").eval()
    model.load_state_dict(exact.state_dict())
    exact.load_state_dict(model.state_dict())  # rounded
    x = torch.randn(2, 50, m.hidden_size, device="cuda", dtype=torch.bfloat16)
    ours, chosen = model.model.layers[0].mlp(x)
    plain, _ = exact.model.layers[0].mlp(x.double().cpu(), chosen.cpu())
    assert relative_error(ours.cpu(), plain) < TOLERANCE[torch.bfloat16]
