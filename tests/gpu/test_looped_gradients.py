"""Weight gradients of a looped model, added up inside the matrix products or by autograd."""

from typing import Any

import pytest
import torch

from pltmoe.model.megatron_config import Fp8
from pltmoe.runtime import devices
from tests.unit.model.looped_gradients import (
    DENSE_TIED,
    PLT3,
    assert_near,
    flags_of_upstream,
    gradients,
)


@pytest.mark.parametrize("recipe", [None, "tensorwise", "delayed"])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_fused_equals_unfused(micro_batches: int, recipe: Any, groups: Any) -> None:
    """Unfused sums loops in bf16, fused in fp32: 8 bits apart, a few terms deep."""
    pytest.importorskip("transformer_engine.pytorch", reason="needs Transformer Engine")
    fp8 = None if recipe is None else Fp8(recipe)
    expected = gradients(groups, micro_batches, fused=False, fp8=fp8)
    assert_near(gradients(groups, micro_batches, fused=True, fp8=fp8), expected, 0.02)


@pytest.mark.parametrize("model", [PLT3, DENSE_TIED], ids=["moe", "dense tied"])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_apex_equals_unfused(micro_batches: int, model: dict[str, Any], groups: Any) -> None:
    """Local layers; Apex's kernel always adds, so no flag has to be kept down."""
    if (why_not := devices.why_no_apex_products(torch.bfloat16)) is not None:
        pytest.skip(why_not)
    expected = gradients(groups, micro_batches, False, "local", model=model)
    assert_near(gradients(groups, micro_batches, True, "local", model=model), expected, 0.02)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_upstreams_flags_lose_the_gradients_of_later_loops(micro_batches: int, groups: Any) -> None:
    """What this guards against; if it fails, upstream has mended it and ours can go."""
    pytest.importorskip("transformer_engine.pytorch", reason="needs Transformer Engine")
    right = gradients(groups, micro_batches, fused=True)
    with flags_of_upstream():
        wrong = gradients(groups, micro_batches, fused=True)
    name = next(n for n in right if n.endswith("linear_qkv.weight"))
    assert (wrong[name] - right[name]).norm() > 0.2 * right[name].norm()
