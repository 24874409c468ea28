"""Weight gradients of a looped model, added up inside the matrix products or by autograd."""

from typing import Any

import pytest
import torch

from pltmoe.config import config_from_dict
from pltmoe.engines.megatron_optimizer import wrap_in_ddp
from pltmoe.model.initialize import initialize
from pltmoe.model.megatron_config import Fp8
from pltmoe.parallel.layout import layout_for
from pltmoe.parallel.pipeline import Pipeline, build_stage
from tests.distributed.tiny import batches
from tests.unit.config.trees import LOOP_ROWS, MOE, run_tree

SIZES = {"hidden_size": 256, "head_dim": 64, "moe_ffn_hidden_size": 128, "init_std": 0.05}


def gradients(
    groups: Any, micro_batches: int, fused: bool, fp8: Fp8 | None, upstream: bool = False
) -> dict[str, torch.Tensor]:
    """Return main_grad of every weight after the second of two steps (no update between)."""
    tree = run_tree(train__micro_batch_size=2, data__sequence_length=16)
    tree["model"] = MOE | LOOP_ROWS["6 plt3"] | SIZES
    tree["train"] |= {
        "global_batch_size": 2 * micro_batches, "gradient_accumulation_fusion": fused,
    }  # fmt: skip
    config = config_from_dict(tree)
    layout, device = layout_for(config, 1), torch.device("cuda", 0)
    stage = build_stage(config, layout, groups, torch.bfloat16, device, "transformer_engine", fp8)
    initialize(stage, 1)
    ddp = wrap_in_ddp(stage, groups)
    pipeline = Pipeline(stage, ddp, layout, groups, 16, device)
    stage.config.finalize_model_grads_func = None
    if upstream:  # as megatron-core 0.19.2 leaves the flags
        pipeline_begin = "pltmoe.parallel.pipeline.begin_step"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pipeline_begin, _raise_flags)
            return _after_a_step(ddp, pipeline, layout)
    return _after_a_step(ddp, pipeline, layout)


def _raise_flags(stage: Any) -> None:
    for module in stage.modules():
        if hasattr(module, "is_first_microbatch"):
            module.is_first_microbatch = True


def _after_a_step(ddp: Any, pipeline: Pipeline, layout: Any) -> dict[str, torch.Tensor]:
    for _ in range(2):
        ddp.zero_grad_buffer()
        source = batches(layout)
        pipeline.run([next(source) for _ in range(layout.micro_batches)], forward_only=False)
    return {name: p.main_grad.clone() for name, p in ddp.module.named_parameters()}


@pytest.mark.parametrize("recipe", [None, "tensorwise", "delayed"])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_fused_equals_unfused(micro_batches: int, recipe: Any, groups: Any) -> None:
    """Unfused sums loops in bf16, fused in fp32: 8 bits apart, a few terms deep."""
    pytest.importorskip("transformer_engine.pytorch", reason="needs Transformer Engine")
    fp8 = None if recipe is None else Fp8(recipe)
    expected = gradients(groups, micro_batches, fused=False, fp8=fp8)
    found = gradients(groups, micro_batches, fused=True, fp8=fp8)
    for name, gradient in expected.items():
        if gradient.any():
            error = (found[name] - gradient).norm() / gradient.norm()
            assert error < 0.02, (name, error.item())


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_upstreams_flags_lose_the_gradients_of_later_loops(micro_batches: int, groups: Any) -> None:
    """What this guards against; if it fails, upstream has mended it and ours can go."""
    pytest.importorskip("transformer_engine.pytorch", reason="needs Transformer Engine")
    right = gradients(groups, micro_batches, fused=True, fp8=None)
    wrong = gradients(groups, micro_batches, fused=True, fp8=None, upstream=True)
    name = next(n for n in right if n.endswith("linear_qkv.weight"))
    assert (wrong[name] - right[name]).norm() > 0.2 * right[name].norm()
