"""Weight gradients added up inside Apex's products: the way there, with its kernel written out.

The kernel itself needs a GPU (tests/gpu/test_looped_gradients.py).
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel import layers
from torch import Tensor

from tests.unit.model.looped_gradients import DENSE_TIED, PLT3, assert_near, gradients

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="there is a GPU: tests/gpu runs the kernel itself"
)


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Put the formula in the kernel's place; return the shapes of its weights."""
    shapes = []

    def add_product(x_ti: Tensor, dy_to: Tensor, main_grad_oi: Tensor) -> None:
        shapes.append(main_grad_oi.shape)
        main_grad_oi.addmm_(dy_to.t(), x_ti)

    kernel = SimpleNamespace(wgrad_gemm_accum_fp32=add_product)
    monkeypatch.setattr(layers, "_grad_accum_fusion_available", True)
    monkeypatch.setattr(layers, "fused_weight_gradient_mlp_cuda", kernel, raising=False)
    return shapes


@pytest.mark.parametrize("model", [PLT3, DENSE_TIED], ids=["moe", "dense tied"])
def test_gradients_of_all_loops_and_of_tied_embeddings_add_up(
    model: dict[str, Any], groups: Any, products: list[torch.Size]
) -> None:
    fused, unfused = (
        gradients(groups, 2, on, "local", model=model, dtype=torch.float32) for on in (True, False)
    )
    assert_near(fused, unfused, 1e-5)
    head, steps, micro_batches = (model["vocab_size"], model["hidden_size"]), 2, 2
    assert products.count(torch.Size(head)) == steps * micro_batches
    qkv = next(g.shape for name, g in fused.items() if "linear_qkv" in name)
    uses = steps * micro_batches * model["num_loops"] * model["num_layers"]
    assert products.count(qkv) == uses
