"""Weight gradients of a looped model after a step of the pipeline, for CPU and GPU tests."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor

from pltmoe.engines.megatron_optimizer import wrap_in_ddp
from pltmoe.model.initialize import initialize
from pltmoe.model.megatron_config import Fp8
from pltmoe.parallel.layout import layout_for
from pltmoe.parallel.pipeline import Pipeline, build_stage
from tests.configs import DENSE, LOOP_ROWS, MOE, run_config
from tests.distributed.tiny import batches
from tests.single_process import device

SIZES = {"hidden_size": 256, "head_dim": 64, "moe_ffn_hidden_size": 128, "init_std": 0.05}
PLT3 = MOE | LOOP_ROWS["6 plt3"] | SIZES
DENSE_TIED = DENSE | LOOP_ROWS["5 plt2"] | SIZES | {
    "moe_ffn_hidden_size": None, "ffn_hidden_size": 128, "tied_embeddings": True,
}  # fmt: skip


def gradients(
    groups: Any,
    micro_batches: int,
    fused: bool,
    impl: Any = "transformer_engine",
    *,
    model: dict[str, Any] = PLT3,
    dtype: torch.dtype = torch.bfloat16,
    fp8: Fp8 | None = None,
) -> dict[str, Tensor]:
    """Return main_grad of every weight after the second of two steps (no update between)."""
    config = run_config(
        model=model,
        data__sequence_length=16,
        train__micro_batch_size=2,
        train__global_batch_size=2 * micro_batches,
        train__gradient_accumulation_fusion=fused,
    )
    layout = layout_for(config, 1)
    # What a model that runs without a pipeline leaves has another shape.
    MoEAuxLossAutoScaler.main_loss_backward_scale = None
    stage = build_stage(config, layout, groups, dtype, device(), impl, fp8)
    initialize(stage, 1)
    ddp = wrap_in_ddp(stage, groups)
    pipeline = Pipeline(stage, ddp, layout, groups, 16, device())
    stage.config.finalize_model_grads_func = None
    for _ in range(2):
        ddp.zero_grad_buffer()
        source = batches(layout)
        pipeline.run([next(source) for _ in range(layout.micro_batches)], forward_only=False)
    return {name: p.main_grad.clone() for name, p in stage.named_parameters()}


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Raise unless every gradient is as near, by its norm."""
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        error = (found[name] - gradient).norm()
        assert error <= tolerance * gradient.norm(), (name, (error / gradient.norm()).item())


@contextmanager
def flags_of_upstream() -> Iterator[None]:
    """Let a step begin with the flags as megatron-core 0.19.2 leaves them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pltmoe.parallel.pipeline.begin_step", _raise_flags)
        yield


def _raise_flags(stage: Any) -> None:
    for module in stage.modules():
        if hasattr(module, "is_first_microbatch"):
            module.is_first_microbatch = True
