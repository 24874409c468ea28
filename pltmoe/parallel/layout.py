"""Rank arithmetic: how many copies of what, and who reads which sequences. Pure.

Every rank holds the attention weights and reads its own sequences; experts are split over groups
of ``expert_parallel_size`` neighbouring ranks. Four ranks, EP2 x DP2:

    rank            0          1          2          3
    sequences       a          b          c          d        data_parallel_size = 4
    attention       copy       copy       copy       copy
    experts (of 8)  0-3        4-7        0-3        4-7      expert_data_parallel_size = 2
"""

from dataclasses import dataclass

from pltmoe.config import RunConfig
from pltmoe.errors import ConfigError, EngineError


@dataclass(frozen=True)
class Layout:
    """Sizes of the process groups, and the batch sizes that follow."""

    world_size: int
    """Processes in total, one per GPU."""
    expert_parallel_size: int
    """Ranks that share the experts of a layer."""
    micro_batch_size: int
    """Sequences of one forward pass on one rank."""
    global_batch_size: int
    """Sequences of one optimizer step over all ranks."""

    @property
    def data_parallel_size(self) -> int:
        """Ranks that read different sequences."""
        return self.world_size

    @property
    def expert_data_parallel_size(self) -> int:
        """Copies of each expert."""
        return self.world_size // self.expert_parallel_size

    @property
    def micro_batches(self) -> int:
        """Forward passes of one rank per optimizer step (gradient accumulation)."""
        return self.global_batch_size // (self.micro_batch_size * self.data_parallel_size)

    def __str__(self) -> str:
        return f"EP{self.expert_parallel_size} x DP{self.expert_data_parallel_size}"


def layout_for(config: RunConfig, world_size: int) -> Layout:
    """Fit the configuration onto ``world_size`` processes.

    Raises:
        EngineError: the processes cannot be split into whole expert-parallel groups.
        ConfigError: the global batch is not a whole number of micro batches on every rank.
    """
    expert_parallel = config.parallel.expert_parallel_size
    if world_size % expert_parallel:
        raise EngineError(
            f"{world_size} process(es) cannot be split into groups of "
            f"parallel.expert_parallel_size ({expert_parallel}): start torchrun with a multiple of "
            f"{expert_parallel} processes, or set parallel.expert_parallel_size=1"
        )
    micro, total = config.train.micro_batch_size, config.train.global_batch_size
    if total % (micro * world_size):
        raise ConfigError(
            f"train.global_batch_size ({total}) must be a multiple of train.micro_batch_size "
            f"({micro}) x data-parallel size ({world_size} processes) = {micro * world_size}"
        )
    return Layout(world_size, expert_parallel, micro, total)
