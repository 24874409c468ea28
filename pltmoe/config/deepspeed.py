"""DeepSpeed's JSON from our configuration, and what DeepSpeed cannot do with this model. Pure.

| DeepSpeed's key                                       | comes from                              |
|-------------------------------------------------------|-----------------------------------------|
| train_batch_size                                      | train.global_batch_size                 |
| train_micro_batch_size_per_gpu                        | train.micro_batch_size                  |
| gradient_accumulation_steps                           | both, and the data-parallel size        |
| gradient_clipping                                     | optimizer.clip_grad_norm                |
| bf16.enabled                                          | train.precision                         |
| zero_optimization.overlap_comm                        | parallel.overlap_grad_reduce            |
| data_types.grad_accum_dtype, communication_data_type  | fp32, as Megatron's gradients           |

The section ``deepspeed`` of a configuration is merged in: sizes of buckets, ZeRO's stage, offload
(``nvme_path``: runs may share it, each has a folder in it).
It may say again what stands in the table, and not otherwise; optimizer, schedule and everything
parallel are not DeepSpeed's to decide.
"""

import difflib
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pltmoe.config.run import RunConfig

DEFAULT_STAGE = 1
FILE = "deepspeed.json"
"""What a run's folder holds of it."""
_DECIDED_ELSEWHERE = {
    "optimizer": "optimizer.*",
    "scheduler": "optimizer.schedule",
    "fp16": "train.precision",
    "amp": "train.precision",
    "torch_autocast": "train.precision",
    "activation_checkpointing": "parallel.recompute",
    "tensor_parallel": "parallel.tensor_parallel_size",
    "expert_parallel": "parallel.expert_parallel_size",
    "sequence_parallel_size": "parallel.context_parallel_size",
    "pipeline": "parallel.pipeline_parallel_size",
    "checkpoint": "checkpoint.*",
    "load_universal_checkpoint": "checkpoint.resume",
    "tensorboard": "tracking.*",
    "wandb": "tracking.*",
    "comet": "tracking.*",
    "csv_monitor": "tracking.*",
    "steps_per_print": "train.log_interval",
}
"""DeepSpeed's key -> what decides that here."""
_SAME = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_clipping": "optimizer.clip_grad_norm",
    "bf16.enabled": "train.precision",
    "zero_optimization.overlap_comm": "parallel.overlap_grad_reduce",
    "communication_data_type": "precision of gradients",
    "data_types.grad_accum_dtype": "precision of gradients",
}
"""DeepSpeed's key -> what says the same here."""
_ACTS_AT: dict[str, tuple[int, ...]] = {
    "reduce_bucket_size": (1, 2, 3),
    "allgather_bucket_size": (1, 2),
    "use_multi_rank_bucket_allreduce": (1, 2),
    "sub_group_size": (3,),
    "stage3_prefetch_bucket_size": (3,),
    "stage3_param_persistence_threshold": (3,),
    "stage3_model_persistence_threshold": (3,),
    "stage3_max_live_parameters": (3,),
    "stage3_max_reuse_distance": (3,),
}
"""Key of zero_optimization -> the stages that look at it."""
_NOT_IN_BF16_OPTIMIZER = ("reduce_bucket_size", "use_multi_rank_bucket_allreduce")
"""At stage 1 DeepSpeed's optimizer for bf16 is another one."""
_OFFLOAD = tuple(
    f"offload_optimizer.{key}" for key in ("device", "pin_memory", "nvme_path", "buffer_count")
)
_AIO = ("block_size", "queue_depth", "intra_op_parallelism", "single_submit", "overlap_events")
_FREE = {
    *(f"zero_optimization.{key}" for key in ("stage", *_ACTS_AT, *_OFFLOAD)),
    *(f"aio.{key}" for key in _AIO),
    "wall_clock_breakdown",
    "memory_breakdown",
}
"""Keys that are handed on. Others would break what the engine counts on (a second optimizer, steps
that cannot be skipped, other gradients), end in errors in the middle of a step
(stage3_module_granularity_threshold), be ignored by DeepSpeed without a word, or change where
its stages 1 and 2 keep a weight's state without telling (round_robin_gradients,
parameter_alignment): checkpoints would hold the moments of other weights."""
_FLAGS = (
    "zero_optimization.use_multi_rank_bucket_allreduce",
    "zero_optimization.offload_optimizer.pin_memory",
    "aio.single_submit",
    "aio.overlap_events",
    "wall_clock_breakdown",
    "memory_breakdown",
)
_TEXTS = (
    "zero_optimization.offload_optimizer.device",
    "zero_optimization.offload_optimizer.nvme_path",
)
"""Of the keys that are handed on; the others are numbers (``stage`` has a rule of its own)."""
_SWAPPED = 4
"""Buffers for what a step swaps: weights, two moments, gradients."""
_SECTIONS = (
    "zero_optimization",
    "zero_optimization.offload_optimizer",
    "aio",
    "bf16",
    "data_types",
)


def zero_stage(config: RunConfig) -> Any:
    """Return the ZeRO stage that is asked for, whatever it is."""
    return _zero(config).get("stage", DEFAULT_STAGE)


def offload_device(config: RunConfig) -> str | None:
    """Return where the optimizer's state is offloaded to: ``cpu``, ``nvme`` or None."""
    device = _offload(config).get("device")
    return None if device in (None, "none") else str(device)


def swap_folder(config: RunConfig) -> Path:
    """Return where an optimizer on a disk lies: a run has a folder, and finds it again."""
    run = hashlib.sha1(str(config.train.output_dir.absolute()).encode()).hexdigest()[:12]
    return Path(str(_offload(config).get("nvme_path"))) / f"pltmoe_{run}"


def reduce_bucket_size(config: RunConfig) -> float:
    """Return the numbers in a bucket of gradients."""
    return float(_zero(config).get("reduce_bucket_size", 5e8))


def merged(config: RunConfig, *, bf16: bool, micro_batches: int) -> dict[str, Any]:
    """Return the whole JSON: the section ``deepspeed``, and over it what our fields decide.

    Args:
        config: the run.
        bf16: whether weights are bf16 on this machine.
        micro_batches: per rank and step.
    """
    stage = zero_stage(config)
    decided: dict[str, Any] = {
        "train_batch_size": config.train.global_batch_size,
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": micro_batches,
        # Stage 0 has no norm over experts on several ranks: the engine clips there.
        "gradient_clipping": config.optimizer.clip_grad_norm if stage else 0.0,
        "bf16": {"enabled": bf16},
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": config.parallel.overlap_grad_reduce,
        },
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "timers": {"throughput": {"enabled": False}},  # they wait for the GPU at each micro batch
    }
    if offload_device(config) == "nvme":
        folder = str(swap_folder(config))
        decided["zero_optimization"]["offload_optimizer"] = {"nvme_path": folder}
    return _merge({"steps_per_print": 2**31 - 1, **config.deepspeed}, decided)


def rules(c: RunConfig) -> Iterator[str]:
    """Yield what of the configuration DeepSpeed cannot do, or decides twice."""
    yield from _parallel(c)
    yield from _zero_fits(c)
    yield from _other_features(c)
    yield from _section(c)


def _parallel(c: RunConfig) -> Iterator[str]:
    p = c.parallel
    for name, value, instead in (
        ("pipeline_parallel_size", p.pipeline_parallel_size, "parallel.expert_parallel_size"),
        ("context_parallel_size", p.context_parallel_size, "parallel.recompute=full"),
        ("expert_tensor_parallel_size", p.expert_tensor_parallel_size, "more expert parallelism"),
    ):
        if value > 1:
            yield (
                f"parallel.{name} ({value}) cannot be used with engine deepspeed: use engine="
                f"megatron, or {instead}"
            )


def _zero_fits(c: RunConfig) -> Iterator[str]:
    stage, p = zero_stage(c), c.parallel
    if stage not in (0, 1, 2, 3):
        yield f"deepspeed.zero_optimization.stage ({stage}) must be 0, 1, 2 or 3"
        return
    for name in ("expert_parallel_size", "tensor_parallel_size"):
        if stage == 3 and c.model.is_moe and getattr(p, name) > 1:
            yield (
                f"deepspeed.zero_optimization.stage (3) with experts and parallel.{name} "
                f"({getattr(p, name)}): DeepSpeed would gather other ranks' experts; use stage 2, "
                f"or parallel.{name}=1"
            )
    device = offload_device(c)
    if device is not None and stage == 0:
        yield (
            f"deepspeed.zero_optimization.offload_optimizer ({device}) needs "
            "deepspeed.zero_optimization.stage of at least 1 (it is 0)"
        )
    if device not in (None, "cpu", "nvme"):
        yield (
            f"deepspeed.zero_optimization.offload_optimizer.device ({device}) must be cpu, nvme or "
            "none"
        )
    if device == "nvme" and stage != 3:
        yield (
            f"deepspeed.zero_optimization.offload_optimizer.device (nvme) needs "
            f"deepspeed.zero_optimization.stage 3 (it is {stage}): DeepSpeed swaps its parts only; "
            "use cpu"
        )
    path = _offload(c).get("nvme_path")
    if device == "nvme" and not isinstance(path, str):
        yield (
            "deepspeed.zero_optimization.offload_optimizer.device (nvme) needs nvme_path "
            f"({path}): a folder on a local disk"
        )
    if device != "nvme" and path is not None:
        yield (
            f"deepspeed.zero_optimization.offload_optimizer.nvme_path ({path}) needs device nvme "
            f"(it is {device})"
        )
    buffers = _offload(c).get("buffer_count")
    if device == "nvme" and isinstance(buffers, int) and buffers < _SWAPPED:
        yield (
            f"deepspeed.zero_optimization.offload_optimizer.buffer_count ({buffers}) must be at "
            f"least {_SWAPPED}: weights, two moments and gradients are swapped"
        )
    if stage == 0 and c.train.precision == "bf16":
        yield (
            "deepspeed.zero_optimization.stage (0) with train.precision (bf16): DeepSpeed would "
            "keep neither fp32 weights nor fp32 gradients; use stage 1"
        )


def _other_features(c: RunConfig) -> Iterator[str]:
    if c.train.precision == "fp8":
        yield "train.precision (fp8) cannot be used with engine deepspeed: use engine=megatron"
    if c.train.gradient_accumulation_fusion:
        yield (
            "train.gradient_accumulation_fusion (true) adds to Megatron's gradient buffers, which "
            "engine deepspeed does not have: set it to false"
        )


def _section(c: RunConfig) -> Iterator[str]:
    means: dict[str, Any] = {"fp32": False, "bf16": True}
    ours = {
        "train.global_batch_size": c.train.global_batch_size,
        "train.micro_batch_size": c.train.micro_batch_size,
        "optimizer.clip_grad_norm": c.optimizer.clip_grad_norm,
        "train.precision": c.train.precision,
        "parallel.overlap_grad_reduce": c.parallel.overlap_grad_reduce,
        "precision of gradients": "fp32",
    }
    for path, value in _leaves(c.deepspeed):
        top = path.partition(".")[0]
        if top in _DECIDED_ELSEWHERE:
            yield f"deepspeed.{top} is decided by {_DECIDED_ELSEWHERE[top]} here: remove it"
        elif path in _SECTIONS:
            if value is not None or path != "zero_optimization.offload_optimizer":
                yield f"deepspeed.{path} ({value}) must be a section with keys of its own"
        elif path in _SAME:
            field = _SAME[path]
            same = means.get(ours[field], ours[field]) if path == "bf16.enabled" else ours[field]
            if value != same:
                yield (
                    f"deepspeed.{path} ({value}) contradicts {field} ({ours[field]}): "
                    "remove the first"
                )
        elif path == "gradient_accumulation_steps":
            yield (
                f"deepspeed.{path} ({value}) follows from train.global_batch_size "
                f"({c.train.global_batch_size}) and train.micro_batch_size "
                f"({c.train.micro_batch_size}): remove it"
            )
        elif path not in _FREE:
            yield (
                f"deepspeed.{path} ({value}) is none of the keys of DeepSpeed's JSON that are "
                f"handed on: {_instead(path)}"
            )
        else:
            yield from _has_its_type(path, value)
            yield from _acts(c, path, value)


def _acts(c: RunConfig, path: str, value: Any) -> Iterator[str]:
    """Yield why DeepSpeed would not look at a key."""
    key = path.removeprefix("zero_optimization.")
    stage, device = zero_stage(c), offload_device(c)
    where = f"deepspeed.{path} ({value}) would be ignored"
    stages = _ACTS_AT.get(key, range(4))
    if stage in range(4) and stage not in stages:
        at = " or ".join(map(str, stages))
        yield f"{where} at deepspeed.zero_optimization.stage {stage}: it is for stage {at}"
    elif key in _NOT_IN_BF16_OPTIMIZER and (stage, device) == (1, None):
        if c.train.precision != "fp32":
            yield (
                f"{where} at deepspeed.zero_optimization.stage 1 unless train.precision is fp32 "
                f"(it is {c.train.precision}): remove it, or use stage 2"
            )
    elif device != "nvme" and (path.startswith("aio.") or key == "offload_optimizer.buffer_count"):
        yield (
            f"{where}: it is for deepspeed.zero_optimization.offload_optimizer.device nvme "
            f"(it is {device})"
        )
    elif key == "offload_optimizer.pin_memory" and value is True and device is None:
        yield f"{where}: deepspeed.zero_optimization.offload_optimizer has no device"


def _instead(path: str) -> str:
    """Return the key that was meant, or what there is in its section."""
    # Paths share their sections: only a letter or two may differ.
    if close := difflib.get_close_matches(path, [*_FREE, *_SAME, *_SECTIONS], 1, cutoff=0.9):
        return f"did you mean deepspeed.{close[0]}?"
    section = path.partition(".")[0]
    inside = sorted(key for key in _FREE if key.startswith(f"{section}."))
    keys = inside or sorted({key.partition(".")[0] for key in _FREE})
    return f"there are {', '.join(keys)}"


def _has_its_type(path: str, value: Any) -> Iterator[str]:
    if path in _FLAGS and not isinstance(value, bool):
        yield f"deepspeed.{path} ({value!r}) must be true or false"
    if path in _TEXTS or path in _FLAGS or path == "zero_optimization.stage":
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
        hint = " (in YAML a power of ten is written 5.0e+8)" if isinstance(value, str) else ""
        yield f"deepspeed.{path} ({value!r}) must be a number of at least 0{hint}"


def _zero(config: RunConfig) -> Mapping[str, Any]:
    zero = config.deepspeed.get("zero_optimization")
    return zero if isinstance(zero, Mapping) else {}


def _offload(config: RunConfig) -> Mapping[str, Any]:
    section = _zero(config).get("offload_optimizer")
    return section if isinstance(section, Mapping) else {}


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted path, value) of everything that is no section."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Lay ``above`` over ``below``, section by section."""
    result = dict(below)
    for key, value in above.items():
        inner = result.get(key)
        both = isinstance(inner, Mapping) and isinstance(value, Mapping)
        result[key] = _merge(inner, value) if both else value  # type: ignore[arg-type]
    return result
