"""Rank arithmetic: who holds which layers, heads and experts, and reads which sequences. Pure.

Ranks are numbered as in Megatron, tensor parallel fastest ("tp-cp-ep-dp-pp"), and twice over the
same numbers: once for attention and everything else, once for the experts.

    rank = tp  + TP  * (cp + CP * (dp  + DP  * pp))
    rank = etp + ETP * (ep + EP * (edp + EDP * pp))

Four ranks, EP2 x DP4 (experts are split over neighbouring data-parallel ranks):

    rank            0          1          2          3
    sequences       a          b          c          d        data_parallel_size = 4
    attention       copy       copy       copy       copy
    experts (of 8)  0-3        4-7        0-3        4-7      expert_data_parallel_size = 2

Two stages with two model chunks each, eight layers, run L times:

    stage 0         layers 0 1      4 5
    stage 1               2 3      6 7
"""

from dataclasses import dataclass

from pltmoe.config import RunConfig
from pltmoe.errors import ConfigError, EngineError


@dataclass(frozen=True)
class Coordinates:
    """Where one rank stands on every axis, each from 0."""

    tensor: int
    context: int
    data: int
    stage: int
    expert_tensor: int
    expert: int
    expert_data: int


@dataclass(frozen=True)
class Layout:
    """Sizes of the process groups, and the batch sizes that follow."""

    world_size: int
    """Processes in total, one per GPU."""
    micro_batch_size: int
    """Sequences of one forward pass on one data-parallel rank."""
    global_batch_size: int
    """Sequences of one optimizer step over all ranks."""
    tensor_parallel_size: int = 1
    sequence_parallel: bool = False
    """Whether the residual stream is cut over tensor-parallel ranks (never with one rank)."""
    pipeline_parallel_size: int = 1
    model_chunks_per_stage: int = 1
    context_parallel_size: int = 1
    expert_parallel_size: int = 1
    expert_tensor_parallel_size: int = 1
    num_loops: int = 1
    """L: each loop is a trip through all chunks of all stages."""

    @property
    def data_parallel_size(self) -> int:
        """Groups of ranks that read different sequences."""
        model = self.tensor_parallel_size * self.context_parallel_size * self.pipeline_parallel_size
        return self.world_size // model

    @property
    def expert_data_parallel_size(self) -> int:
        """Copies of each expert."""
        experts = self.expert_parallel_size * self.expert_tensor_parallel_size
        return self.world_size // (experts * self.pipeline_parallel_size)

    @property
    def micro_batches(self) -> int:
        """Forward passes of one rank per optimizer step (gradient accumulation)."""
        return self.global_batch_size // (self.micro_batch_size * self.data_parallel_size)

    @property
    def loop_chunks(self) -> int:
        """Virtual pipeline stages of a rank: its model chunks, once per loop (loop slowest)."""
        return self.num_loops * self.model_chunks_per_stage

    def coordinates(self, rank: int) -> Coordinates:
        """Return where ``rank`` stands."""
        tensor, rest = rank % self.tensor_parallel_size, rank // self.tensor_parallel_size
        context, rest = rest % self.context_parallel_size, rest // self.context_parallel_size
        data, stage = rest % self.data_parallel_size, rest // self.data_parallel_size
        split = self.expert_tensor_parallel_size
        etp, rest = rank % split, rank // split
        ep, rest = rest % self.expert_parallel_size, rest // self.expert_parallel_size
        edp = rest % self.expert_data_parallel_size
        return Coordinates(tensor, context, data, stage, etp, ep, edp)

    def stage_chunks(self, num_layers: int, stage: int) -> list[range]:
        """Return the layers (from 0) of each model chunk of a stage, in the order they run."""
        chunks = self.pipeline_parallel_size * self.model_chunks_per_stage
        size = num_layers // chunks
        starts = range(stage * size, num_layers, self.pipeline_parallel_size * size)
        return [range(start, start + size) for start in starts]

    def __str__(self) -> str:
        parts = [
            f"{name}{size}"
            for name, size in (
                ("PP", self.pipeline_parallel_size),
                ("TP", self.tensor_parallel_size),
                ("CP", self.context_parallel_size),
                ("EP", self.expert_parallel_size),
                ("ETP", self.expert_tensor_parallel_size),
            )
            if size > 1
        ]
        return " x ".join([*parts, f"DP{self.data_parallel_size}"])


def layout_for(config: RunConfig, world_size: int) -> Layout:
    """Fit the configuration onto ``world_size`` processes.

    Raises:
        EngineError: the processes cannot be split into whole groups.
        ConfigError: the global batch is not a whole number of micro batches on every rank, or has
            fewer micro batches than stages.
    """
    p = config.parallel
    _check_groups(config, world_size)
    layout = Layout(
        world_size=world_size,
        micro_batch_size=config.train.micro_batch_size,
        global_batch_size=config.train.global_batch_size,
        tensor_parallel_size=p.tensor_parallel_size,
        sequence_parallel=p.sequence_parallel and p.tensor_parallel_size > 1,
        pipeline_parallel_size=p.pipeline_parallel_size,
        model_chunks_per_stage=p.model_chunks_per_stage,
        context_parallel_size=p.context_parallel_size,
        expert_parallel_size=p.expert_parallel_size,
        expert_tensor_parallel_size=p.expert_tensor_parallel_size,
        num_loops=config.model.num_loops,
    )
    micro, total, dp = layout.micro_batch_size, layout.global_batch_size, layout.data_parallel_size
    if total % (micro * dp):
        raise ConfigError(
            f"train.global_batch_size ({total}) must be a multiple of train.micro_batch_size "
            f"({micro}) x data-parallel size ({dp}, of {world_size} processes) = {micro * dp}"
        )
    stages = layout.pipeline_parallel_size
    if stages > 1 and layout.loop_chunks > 1 and layout.micro_batches < stages:
        raise ConfigError(
            f"train.global_batch_size ({total}) makes {layout.micro_batches} micro batch(es) per "
            f"step, fewer than parallel.pipeline_parallel_size ({stages}): loops are interleaved "
            f"over the stages, which takes at least {stages}; raise train.global_batch_size to "
            f"{micro * dp * stages} or more"
        )
    return layout


def _check_groups(config: RunConfig, world_size: int) -> None:
    """Check that the processes make whole groups, attention's and the experts'."""
    p = config.parallel
    attention = {
        "tensor_parallel_size": p.tensor_parallel_size,
        "context_parallel_size": p.context_parallel_size,
        "pipeline_parallel_size": p.pipeline_parallel_size,
    }
    experts = {
        "expert_parallel_size": p.expert_parallel_size,
        "expert_tensor_parallel_size": p.expert_tensor_parallel_size,
        "pipeline_parallel_size": p.pipeline_parallel_size,
    }
    for sizes in (attention, experts):
        product = 1
        for size in sizes.values():
            product *= size
        if world_size % product:
            named = {name: size for name, size in sizes.items() if size > 1}
            says = " x ".join(f"parallel.{name} ({size})" for name, size in named.items())
            back = " ".join(f"parallel.{name}=1" for name in named)
            raise EngineError(
                f"{world_size} process(es) cannot be split into groups of {says}: start torchrun "
                f"with a multiple of {product} processes, or set {back}"
            )
