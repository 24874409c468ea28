"""What test_parallel.py runs on its ranks: gradients of one step in float64, steps in float32."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from torch import Tensor

from pltmoe.config import RunConfig
from pltmoe.engines.megatron_optimizer import wrap_in_ddp
from pltmoe.model.initialize import global_name, initialize, local_slice, tensor_ranks
from pltmoe.model.plt import PLTModel
from pltmoe.parallel.groups import create_groups, destroy_groups
from pltmoe.parallel.layout import layout_for
from pltmoe.parallel.pipeline import Pipeline, build_stage
from pltmoe.parallel.schedule import build_schedule
from pltmoe.runtime import devices, distributed, seeds
from tests.distributed.tiny import batches, build_engine, numbers_of, small_buckets, tiny_config
from tests.unit.parallel.tables import most_lent


def float64_step(config: RunConfig) -> tuple[PLTModel, Pipeline, float]:
    """Run forward and backward of one global batch in float64; returns the mean loss.

    Megatron's cross entropy is float32 whatever the model, so a float64 one takes its place.
    """
    processes = distributed.processes_from_environment()
    distributed.start(processes)
    layout = layout_for(config, processes.world_size)
    groups = create_groups(layout)
    seeds.seed_everything(1)
    stage = build_stage(config, layout, groups, torch.float64, torch.device("cpu"))
    initialize(stage, config.train.seed)
    perturb(stage)
    stage.compute_language_model_loss = partial(cross_entropy, groups.tp)
    with small_buckets():
        ddp = wrap_in_ddp(stage, groups, config.parallel.overlap_grad_reduce)
    pipeline = Pipeline(stage, ddp, layout, groups, 16, torch.device("cpu"))
    # Every data-parallel rank gets whole gradients, not its shard.
    stage.config.finalize_model_grads_func = lambda model, *a, **k: finalize_model_grads(
        [ddp], *a, **{**k, "force_all_reduce": True}
    )
    ddp.zero_grad_buffer()
    source = batches(layout)
    step = [next(source) for _ in range(layout.micro_batches)]
    total = pipeline.run(step, forward_only=False)
    dist.all_reduce(total)
    return stage, pipeline, (total[0] / total[1]).item()


@torch.no_grad()
def perturb(stage: PLTModel) -> None:
    """Move what starts at a constant (norms, gates, expert biases): that would hide errors."""
    for name, tensor in stage.state_dict(keep_vars=True).items():
        if tensor is not None and ("norm" in name or "plt_gate" in name or "expert_bias" in name):
            named = global_name(stage, name)
            generator = torch.Generator().manual_seed(sum(map(ord, named)))
            ranks = tensor_ranks(stage, name)
            shape = list(tensor.shape)
            if getattr(tensor, "tensor_model_parallel", False):
                shape[tensor.partition_dim] *= ranks[1]
            whole = torch.randn(shape, generator=generator, dtype=torch.float64) * 0.1
            tensor.add_(local_slice(whole, name, tensor, *ranks).to(tensor.dtype))


def cross_entropy(tp_group: Any, labels_bs: Tensor, logits_sbv: Tensor) -> Tensor:
    """Float64 cross entropy [b, s] of logits whose vocabulary may be cut."""
    whole = gather_from_tensor_model_parallel_region(logits_sbv, group=tp_group)
    losses = torch.nn.functional.cross_entropy(
        whole.flatten(0, 1), labels_bs.T.flatten(), reduction="none"
    )
    return losses.view(labels_bs.T.shape).T


@contextmanager
def optimizer_in_float64() -> Iterator[None]:
    """Let engines be built in float64: Megatron's optimizer takes it for its full precision.

    (The gradient norm that it reports stays float32.)
    """
    type_, float_ = Tensor.type, Tensor.float

    def type_of(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        asked = not args and not kwargs and self.dtype == torch.float64
        return "torch.cuda.FloatTensor" if asked else type_(self, *args, **kwargs)

    def full(self: Tensor) -> Tensor:
        return self if self.dtype == torch.float64 else float_(self)

    with (
        mock.patch.object(Tensor, "type", type_of),
        mock.patch.object(Tensor, "float", full),
        mock.patch.object(devices, "parameter_dtype", lambda precision: torch.float64),
    ):
        yield


def train_in_float64(
    steps: int, model: dict[str, Any], path: Path, **changes: Any
) -> dict[str, Any]:
    """Take ``steps`` optimizer steps; returns what each reported and how far the weights are off.

    The first to come writes its weights to ``path``, others compare theirs: largest difference of
    each, relative to its largest value.
    """
    config = tiny_config(model, optimizer__clip_grad_norm=0.0, **changes)
    with optimizer_in_float64(), small_buckets():
        engine = build_engine(config)
        stage = engine.model
        stage.compute_language_model_loss = partial(cross_entropy, engine._groups.tp)
        data = batches(engine.capabilities.layout)
        results = [engine.train_step(data, k + 1, watch=True) for k in range(steps)]
        valid = engine.eval_step(data)
    held = {**dict(stage.named_parameters()), **dict(stage.named_buffers())}
    held = {n: t for n, t in held.items() if n.endswith(("weight", "bias"))}
    if not path.exists():
        torch.save({n: t.detach() for n, t in held.items()}, path)
    expected, errors = torch.load(path), {}
    for name, tensor in held.items():
        whole = expected[global_name(stage, name)]
        wanted = local_slice(whole, name, tensor, *tensor_ranks(stage, name))
        scale = whole.abs().max().clamp(min=1e-30)
        errors[global_name(stage, name)] = ((tensor.detach() - wanted).abs().max() / scale).item()
    destroy_groups()
    return {
        **numbers_of(results, valid),
        "errors": errors,
    }


def save_gradients(path: Path, model: dict[str, Any], **changes: Any) -> float:
    """Run the step in one process and write its gradients; returns the loss."""
    stage, _, loss = float64_step(tiny_config(model, **changes))
    torch.save({n: p.main_grad.clone() for n, p in stage.named_parameters()}, path)
    destroy_groups()
    return loss


def compare_gradients(path: Path, model: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Run the step on this layout and compare this rank's gradients with those in ``path``.

    Returns the loss, the largest difference of each parameter relative to its largest gradient,
    and what happened in the pipeline.
    """
    expected = torch.load(path)
    stage, pipeline, loss = float64_step(tiny_config(model, **changes))
    errors = {}
    for name, parameter in stage.named_parameters():
        whole = expected[global_name(stage, name)]
        wanted = local_slice(whole, name, parameter, *tensor_ranks(stage, name))
        difference = (parameter.main_grad - wanted).abs().max()
        errors[global_name(stage, name)] = (difference / whole.abs().max()).item()
    destroy_groups()
    return {"loss": loss, "errors": errors, **_against_schedule(pipeline)}


def _against_schedule(pipeline: Pipeline) -> dict[str, Any]:
    """What the rank did, and what ``parallel/schedule.py`` says its stage does."""
    layout = pipeline.layout
    if layout.pipeline_parallel_size == 1:
        return {"did": [], "planned": [], "lent": pipeline.lending.most, "may_lend": 0}
    table = build_schedule(
        layout.pipeline_parallel_size,
        layout.num_loops,
        layout.model_chunks_per_stage,
        layout.micro_batches,
    )
    planned = table[layout.coordinates(dist.get_rank()).stage]
    return {
        "did": [(e.kind, e.loop, e.chunk, e.micro_batch) for e in pipeline.events],
        "planned": [(op.kind, op.loop, op.chunk, op.micro_batch) for op in planned],
        "lent": pipeline.lending.most,
        "may_lend": most_lent(planned, layout.num_loops),
    }


def stage_is_told_of_new_weights(**layout: Any) -> list[bool]:
    """Run a step with FP8 set (it does nothing on a CPU); were the linear layers' flags raised?"""
    stage, pipeline, _ = float64_step(tiny_config(**layout))
    linear = [m for n, m in stage.named_modules() if n.endswith(("linear_qkv", "linear_proj"))]
    for module in linear:
        module.is_first_microbatch = False
    stage.config.fp8 = "hybrid"
    source = batches(pipeline.layout)
    with torch.no_grad():
        step = [next(source) for _ in range(pipeline.layout.micro_batches)]
        pipeline.run(step, forward_only=True)
    return [module.is_first_microbatch for module in linear]
