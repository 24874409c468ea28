"""All layouts of a run on given GPUs that fit, fastest first."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from typing import Any

from pltmoe.config import RunConfig
from pltmoe.config.rules import broken_rules
from pltmoe.errors import ConfigError, PLTMoEError
from pltmoe.plan.machines import DEFAULT, find_gpu
from pltmoe.plan.planner import Plan, make_plan

_SIZES = (1, 2, 4, 8, 16, 32, 64)
_CHUNKS = (1, 2, 3, 4)
_RECOMPUTE = ("none", "selective", "full")
_MICRO_BATCHES = (1, 2, 4, 8)
_FIXED = {"sequence_parallel": True, "overlap_grad_reduce": False}
"""Fields of ``parallel`` in every layout."""


@dataclass(frozen=True)
class Candidate:
    """What a search may change; everything else stays as configured."""

    tensor_parallel_size: int
    pipeline_parallel_size: int
    model_chunks_per_stage: int
    context_parallel_size: int
    expert_parallel_size: int
    expert_tensor_parallel_size: int
    recompute: str
    micro_batch_size: int

    def apply(self, config: RunConfig) -> RunConfig:
        """Return ``config`` with this layout."""
        values: dict[str, Any] = dict(self.__dict__)
        micro = values.pop("micro_batch_size")
        return config.model_copy(
            update={
                "parallel": config.parallel.model_copy(update=values | _FIXED),
                "train": config.train.model_copy(update={"micro_batch_size": micro}),
            }
        )

    def overrides(self) -> list[str]:
        """Return the settings for a command line."""
        values = dict(self.__dict__)
        micro = values.pop("micro_batch_size")
        named = [f"parallel.{name}={value}" for name, value in values.items()]
        fixed = [f"parallel.{name}={str(value).lower()}" for name, value in _FIXED.items()]
        return [*named, *fixed, f"train.micro_batch_size={micro}"]


def candidates(config: RunConfig, world_size: int) -> list[Candidate]:
    """List layouts whose sizes divide what they cut; tensor parallel stays inside a node."""
    m, node = config.model, DEFAULT.gpus_per_node
    tensor = [n for n in _divisors(m.num_kv_heads, world_size) if n <= node]
    stages = _divisors(m.num_layers, world_size)
    context = [n for n in _SIZES if n <= 8 and config.data.sequence_length % (2 * n) == 0]
    expert = _divisors(m.num_experts or 1, world_size)
    expert_tensor = [n for n in _divisors(m.moe_ffn_hidden_size or 1, node) if n <= 4]
    sizes = product(tensor, stages, _CHUNKS, context, expert, expert_tensor)
    return [
        Candidate(tp, pp, v, cp, ep, etp, recompute, micro)
        for tp, pp, v, cp, ep, etp in sizes
        if world_size % (tp * cp * pp) == 0 and world_size % (ep * etp * pp) == 0
        if (v == 1 or pp > 1) and m.num_layers % (pp * v) == 0
        for recompute, micro in product(_RECOMPUTE, _MICRO_BATCHES)
    ]


def search(
    config: RunConfig, world_size: int, gpu_name: str, among: Iterable[Candidate]
) -> list[tuple[Candidate, Plan]]:
    """Return the layouts that fit, by expected step time.

    Args:
        config: the run; its own layout is not special.
        world_size: GPUs.
        gpu_name: of the planner's table.
        among: layouts to look at, e.g. ``candidates`` behind a progress bar.

    Raises:
        ConfigError: no layout can be planned at all, whatever the memory.
    """
    find_gpu(gpu_name)
    found, planned, refusal = [], False, None
    for candidate in among:
        changed = candidate.apply(config)
        if broken_rules(changed):
            continue
        try:
            plan = make_plan(changed, world_size, gpu_name)
        except PLTMoEError as error:  # the batch does not divide, or has too few micro batches
            refusal = error
            continue
        planned = True
        if plan.fits:
            found.append((candidate, plan))
    if refusal and not planned:
        raise ConfigError(
            f"no layout of {config.name} can be planned on {world_size} x {gpu_name}, whatever "
            f"its memory. The last one tried: {refusal}"
        )
    return sorted(found, key=lambda pair: pair[1].step_seconds)


def _divisors(number: int, limit: int) -> list[int]:
    sizes = sorted({*_SIZES, 3, 6, 12, 24})
    return [size for size in sizes if number % size == 0 and size <= limit]
