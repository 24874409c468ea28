"""The Triton kernels, run by Triton's interpreter on the CPU and compiled for the H200."""

import json
import logging

import pytest
import torch

from pltmoe.inference import attention, experts
from pltmoe.inference.kernels import choose_kernels
from pltmoe.inference.kernels.tiles import rows_per_block
from pltmoe.model.reference import attend
from tests.repository import run_python
from tests.unit.inference.kernel_cases import (
    ATTENTION,
    CHOOSE,
    EXPERTS,
    PROJECT,
    SPLITS,
    STEPS,
    attention_inputs,
    expert_inputs,
)

pytestmark = pytest.mark.xdist_group(__name__)


@pytest.fixture(scope="module")
def errors() -> dict[str, float]:
    done = run_python("-m", "tests.unit.inference.kernel_cases", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("splits", SPLITS)
@pytest.mark.parametrize("name", ATTENTION)
def test_attention_kernel_equals_the_plain_version(
    name: str, splits: int, errors: dict[str, float]
) -> None:
    assert errors[f"{name}-{splits}"] < 1e-6


@pytest.mark.parametrize("name", EXPERTS)
def test_expert_kernels_equal_the_plain_version(name: str, errors: dict[str, float]) -> None:
    assert errors[name] < 2e-6


@pytest.mark.parametrize("name", [*PROJECT, *CHOOSE, "store-False", "store-True", "store-far"])
def test_row_kernels_equal_the_plain_versions(name: str, errors: dict[str, float]) -> None:
    assert errors[name] < 1e-6


@pytest.mark.parametrize("name", STEPS)
def test_a_step_through_the_kernels_is_the_plain_step(name: str, errors: dict[str, float]) -> None:
    assert errors[f"step-{name}"] < 1e-5


@pytest.mark.parametrize("name", ATTENTION)
def test_plain_attention_equals_the_references(name: str) -> None:
    """Row by row, with the reference's own attention over exactly the slots that count."""
    inputs = attention_inputs("cpu", torch.float64, **ATTENTION[name])
    q, k, v, lengths, wk, wv, used, gate = (*inputs, None, None, None, None)[:8]
    y = attention.decode_attention(q, k.nan_to_num(), v.nan_to_num(), lengths, wk, wv, used, gate)
    for i in range(q.size(0)):
        seen = slice(0, lengths[i])
        for loop in range(q.size(1)):
            expected = _attend(q[i, loop], k[i, :, seen], v[i, :, seen])
            if loop > 0 and wk is not None:
                window = slice(0, used[i])
                local = _attend(q[i, loop], wk[i, loop - 1, :, window], wv[i, loop - 1, :, window])
                g = gate[i, loop, :, None]
                expected = g * local + (1 - g) * expected
            torch.testing.assert_close(y[i, loop], expected, rtol=0, atol=1e-12)


def _attend(q_hk: torch.Tensor, k_gnk: torch.Tensor, v_gnk: torch.Tensor) -> torch.Tensor:
    everything = torch.ones(1, k_gnk.size(1), dtype=torch.bool)
    return attend(q_hk[None, :, None], k_gnk[None], v_gnk[None], everything)[0, :, 0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name in EXPERTS if name != "fp8_weights"])
def test_plain_experts_equal_one_row_at_a_time(name: str, dtype: torch.dtype) -> None:
    x, chosen, weight, gate_up, down = expert_inputs("cpu", dtype, **EXPERTS[name])
    y = experts.experts(x, chosen, weight, gate_up, down)
    for row in range(x.size(0)):
        expected = torch.zeros(x.size(1), dtype=torch.float64)
        for expert, share in zip(chosen[row].tolist(), weight[row].double(), strict=True):
            gate, up = (gate_up[expert].double() @ x[row].double()).chunk(2)
            h = torch.nn.functional.silu(gate) * up
            expected += share * (down[expert].double() @ h)
        atol = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.06}[dtype]
        torch.testing.assert_close(y[row].double(), expected, rtol=0, atol=atol)


def test_fp8_weights_keep_three_bits_of_every_weight() -> None:
    weight = torch.randn(3, 8, 16) * torch.logspace(-3, 3, 8)[:, None]
    fp8, scale = experts.quantize(weight)
    back = experts.dequantize(fp8, scale, torch.float32)
    assert fp8.dtype == torch.float8_e4m3fn and fp8.element_size() == 1
    error = (back - weight).abs() / weight.abs().amax(-1, keepdim=True)
    assert error.max() < 2**-4


@pytest.mark.parametrize(
    "rows, count, block", [(8, 256, 16), (2048, 256, 16), (4096, 256, 32), (6144, 256, 64)]
)
def test_an_expert_with_twice_the_mean_fits_one_block(rows: int, count: int, block: int) -> None:
    assert rows_per_block(rows, count) == block
    assert block >= 2 * rows / count or block == 64


def test_plain_versions_are_chosen_on_a_cpu_and_the_reason_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    choose_kernels.cache_clear()
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            kernels = choose_kernels(torch.device("cpu"), torch.float32)
    assert kernels.attention is attention.decode_attention
    assert "need an NVIDIA GPU" in kernels.reason
    assert len([r for r in caplog.records if "need an NVIDIA GPU" in r.getMessage()]) == 1
