"""What is compared: our engine in two configurations, and Megatron-core's own model."""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from pltmoe.config import RunConfig
from pltmoe.config.counts import flops_per_token
from pltmoe.engines import build_engine
from pltmoe.engines.base import Batch
from pltmoe.errors import ConfigError
from pltmoe.model.sdpa import SDPACoreAttention
from pltmoe.parallel.layout import Layout, layout_for
from pltmoe.runtime.logs import log_block
from pltmoe.runtime.memory import tensor_bytes
from pltmoe.train.benchmark.configs import (
    ENGINES,
    MEGATRON,
    PRECISIONS,
    ZERO,
    as_vanilla,
    in_engine,
    in_precision,
)
from pltmoe.train.benchmark.megatron_gpt import MegatronGPT
from pltmoe.train.benchmark.timing import Candidate

ALONE = "step"
logger = logging.getLogger(__name__)


def random_batches(config: RunConfig, layout: Layout, number: int) -> Iterator[Batch]:
    """Yield the micro batches of step ``number``: random tokens, the same for every candidate."""
    generator = torch.Generator().manual_seed(number)
    micro, length = layout.micro_batch_size, config.data.sequence_length
    for _ in range(layout.micro_batches):
        tokens = torch.randint(
            config.model.vocab_size, (micro, length + 1), generator=generator, dtype=torch.int64
        )
        batch = {
            "tokens": tokens[:, :-1].contiguous(),
            "labels": tokens[:, 1:].contiguous(),
            "position_ids": torch.arange(length).expand(micro, length).contiguous(),
            "loss_mask": torch.ones(micro, length),
        }
        on_gpu = torch.cuda.is_available()  # a loader pins them, too
        yield {name: x.pin_memory() if on_gpu else x for name, x in batch.items()}


def work_of(config: RunConfig) -> tuple[int, float]:
    """Return tokens and FLOPs of a step over all ranks."""
    length = config.data.sequence_length
    tokens = config.train.global_batch_size * length
    return tokens, tokens * flops_per_token(config.model, length)


def loops(config: RunConfig, groups: ProcessGroupCollection) -> list[Candidate]:
    """Return the model of ``config`` and the vanilla model of the same layers."""
    return [
        _engine("looped", config, groups)[0],
        _engine("vanilla", as_vanilla(config), groups)[0],
    ]


def megatron(config: RunConfig, groups: ProcessGroupCollection) -> list[Candidate]:
    """Return our vanilla model and Megatron-core's GPT, as it is and with our attention.

    All have the same weights.
    """
    vanilla = as_vanilla(config)
    layout = layout_for(vanilla, dist.get_world_size())
    ours, engine = _engine("vanilla", vanilla, groups)
    found, variants = [ours], [("Megatron-core", None)]
    if engine.model.config.transformer_impl == "local":
        variants.append(("Megatron-core, SDPA", SDPACoreAttention))
    for name, attention in variants:
        theirs = MegatronGPT(vanilla, layout, groups, attention)
        theirs.copy_weights(engine.model)
        found.append(_candidate(name, vanilla, layout, theirs.train_step))
    return found


def alone(config: RunConfig, groups: ProcessGroupCollection) -> list[Candidate]:
    """Return the model of ``config``, which may fill the device."""
    return [_engine(ALONE, config, groups)[0]]


def precisions(config: RunConfig, groups: ProcessGroupCollection) -> list[Candidate]:
    """Return the model of ``config`` with matrix products in FP8, and in bf16."""
    return [
        _engine(precision, in_precision(config, precision), groups)[0] for precision in PRECISIONS
    ]


def engines(config: RunConfig, groups: ProcessGroupCollection) -> tuple[list[Candidate], list[str]]:
    """Return ``config`` in each engine that can run it, and the memory that each takes.

    Raises:
        ConfigError: one of the two whose ratio is wanted cannot.
    """
    found, notes = [], []
    for name in ENGINES:
        try:
            candidate, note = _weighed(name, in_engine(config, name), groups)
        except ConfigError as error:
            if name in (MEGATRON, ZERO):
                raise
            notes.append(f"left out: {error}")
            continue
        found.append(candidate)
        notes.append(note)
    return found, notes


def _weighed(name: str, config: RunConfig, groups: ProcessGroupCollection) -> tuple[Candidate, str]:
    """Build an engine; say what it holds after a step, and after a backward pass."""
    before = tensor_bytes()
    candidate, engine = _engine(name, config, groups)
    candidate.prepare(0)()  # allocates Adam's moments
    held = tensor_bytes() - before
    layout = engine.capabilities.layout
    engine._forward_backward(random_batches(config, layout, 0), forward_only=False)
    gradients = tensor_bytes() - before
    candidate.prepare(0)()  # takes the gradients away (DeepSpeed adds this step's to them first)
    where = "this rank" if layout.world_size > 1 else "the process"
    return candidate, (
        f"tensors of {where}, {name}: {held / 2**20:.1f} MiB between steps, "
        f"{gradients / 2**20:.1f} MiB before an update"
    )


def _engine(name: str, config: RunConfig, groups: ProcessGroupCollection) -> tuple[Candidate, Any]:
    layout = layout_for(config, dist.get_world_size())
    engine = build_engine(config, layout, groups)
    backends = engine.capabilities.backends.items()
    log_block(logger, f"{name} runs with", [(job, str(by)) for job, by in backends])

    def step(batches: Iterator[Batch]) -> float:
        return engine.train_step(batches, 1, watch=False).loss

    return _candidate(name, config, layout, step), engine


def _candidate(
    name: str, config: RunConfig, layout: Layout, step: Callable[[Iterator[Batch]], Any]
) -> Candidate:
    def prepare(number: int) -> Callable[[], float]:
        batches = list(random_batches(config, layout, number))  # a loader's work, not a step's
        return lambda: float(step(iter(batches)))

    return Candidate(name, *work_of(config), prepare)
