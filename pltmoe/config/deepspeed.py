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

The section ``deepspeed`` of a configuration is merged in. It may say again what stands in the
table, and not otherwise; optimizer, schedule and everything parallel are not DeepSpeed's to decide.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from pltmoe.config.run import RunConfig

DEFAULT_STAGE = 1
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
}
"""DeepSpeed's key -> what decides that here."""
_MERGED = {
    "zero_optimization",
    "bf16",
    "data_types",
    "communication_data_type",
    "prescale_gradients",
    "gradient_predivide_factor",
    "aio",
    "steps_per_print",
    "wall_clock_breakdown",
    "memory_breakdown",
    "comms_logger",
    "flops_profiler",
    "zero_force_ds_cpu_optimizer",
}
"""Further keys that are handed on. DeepSpeed takes any other key without a word and ignores it."""


def zero_stage(config: RunConfig) -> Any:
    """Return the ZeRO stage that is asked for, whatever it is."""
    return _zero(config).get("stage", DEFAULT_STAGE)


def offload_device(config: RunConfig) -> str | None:
    """Return where the optimizer's state is offloaded to: ``cpu``, ``nvme`` or None."""
    device = (_zero(config).get("offload_optimizer") or {}).get("device", "none")
    return None if device == "none" else str(device)


def derived(config: RunConfig, *, bf16: bool, micro_batches: int | None = None) -> dict[str, Any]:
    """Return what our fields say in DeepSpeed's words.

    Args:
        config: the run.
        bf16: whether weights are bf16 on this machine.
        micro_batches: per rank and step; None where the number of ranks is not known yet.
    """
    stage = zero_stage(config)
    found: dict[str, Any] = {
        "train_batch_size": config.train.global_batch_size,
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        # Stage 0 has no norm over experts on several ranks: the engine clips there.
        "gradient_clipping": config.optimizer.clip_grad_norm if stage else 0.0,
        "bf16": {"enabled": bf16},
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": config.parallel.overlap_grad_reduce,
        },
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": 2**31 - 1,
    }
    if micro_batches is not None:
        found["gradient_accumulation_steps"] = micro_batches
    return found


def merged(config: RunConfig, *, bf16: bool, micro_batches: int) -> dict[str, Any]:
    """Return the whole JSON: what is derived, and the section ``deepspeed``."""
    return _merge(derived(config, bf16=bf16, micro_batches=micro_batches), config.deepspeed)


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
    if device == "nvme" and stage != 3:
        yield (
            "deepspeed.zero_optimization.offload_optimizer.device (nvme) needs "
            f"deepspeed.zero_optimization.stage 3 (it is {stage}): use device cpu"
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
    known = derived(c, bf16=c.train.precision == "bf16")
    for key, value in c.deepspeed.items():
        if key in _DECIDED_ELSEWHERE:
            yield f"deepspeed.{key} is decided by {_DECIDED_ELSEWHERE[key]} here: remove it"
        elif key == "gradient_accumulation_steps":
            yield (
                f"deepspeed.{key} ({value}) follows from train.global_batch_size "
                f"({c.train.global_batch_size}) and train.micro_batch_size "
                f"({c.train.micro_batch_size}): remove it"
            )
        elif key not in _MERGED | known.keys():
            yield (
                f"deepspeed.{key} is none of the keys of DeepSpeed's JSON that are handed on "
                f"({', '.join(sorted(_MERGED | known.keys()))})"
            )
    yield from _contradictions(c)


_SAME = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_clipping": "optimizer.clip_grad_norm",
    "bf16.enabled": "train.precision",
    "zero_optimization.overlap_comm": "parallel.overlap_grad_reduce",
}
"""DeepSpeed's key -> our field that says the same."""


def _contradictions(c: RunConfig) -> Iterator[str]:
    ours = {
        "train.global_batch_size": c.train.global_batch_size,
        "train.micro_batch_size": c.train.micro_batch_size,
        "optimizer.clip_grad_norm": c.optimizer.clip_grad_norm,
        "train.precision": c.train.precision,
        "parallel.overlap_grad_reduce": c.parallel.overlap_grad_reduce,
    }
    means: dict[str, Any] = {"fp32": False, "bf16": True}
    for path, field in _SAME.items():
        theirs = _get(c.deepspeed, path)
        mine = ours[field]
        if theirs is not None and theirs != means.get(str(mine), mine):
            yield f"deepspeed.{path} ({theirs}) contradicts {field} ({mine}): remove the first"


def _zero(config: RunConfig) -> dict[str, Any]:
    return config.deepspeed.get("zero_optimization") or {}


def _get(tree: Mapping[str, Any], path: str) -> Any:
    for key in path.split("."):
        if not isinstance(tree, Mapping):
            return None
        tree = tree.get(key)  # type: ignore[assignment]
    return tree


def _merge(below: dict[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Lay ``above`` over ``below``, section by section."""
    result = dict(below)
    for key, value in above.items():
        inner = result.get(key)
        both = isinstance(inner, dict) and isinstance(value, Mapping)
        result[key] = _merge(inner, value) if both else value  # type: ignore[arg-type]
    return result
