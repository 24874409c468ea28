"""Forward and backward of one step on this rank, by Megatron-core's own schedules.

One stage: every micro batch runs all loops in one call. Several: (model chunk, loop) is a virtual
pipeline stage, and Megatron's interleaved 1F1B schedule takes the micro batches through

    loop 1: chunk 0, chunk 1, ...   loop 2: chunk 0, chunk 1, ...

so that the stages fill and drain once per step, not once per loop (``parallel/schedule.py``).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from pltmoe.config import RunConfig
from pltmoe.model.first_micro_batch import begin_step, keep_flags_down
from pltmoe.model.megatron_config import Fp8, transformer_config
from pltmoe.model.plt import PLTModel, StageParts
from pltmoe.model.reference import at_least_float32
from pltmoe.parallel.layout import Layout
from pltmoe.parallel.loop_chunks import Event, LoopChunk
from pltmoe.parallel.schedule import group_size
from pltmoe.parallel.shared_kv import Lending
from pltmoe.parallel.slots import CutSlots

Batch = dict[str, Tensor]


def stage_parts(layout: Layout, num_layers: int, rank: int) -> StageParts:
    """Return what ``rank`` holds of the model."""
    stage = layout.coordinates(rank).stage
    chunks = layout.stage_chunks(num_layers, stage)
    return StageParts(tuple(chunks), stage == 0, stage == layout.pipeline_parallel_size - 1)


def describe_layers(
    config: RunConfig,
    dtype: torch.dtype,
    transformer_impl: Literal["local", "transformer_engine"],
    fp8: Fp8 | None,
) -> TransformerConfig:
    """Describe the layers of a run to Megatron-core."""
    return transformer_config(
        config.model,
        params_dtype=dtype,
        parallel=config.parallel,
        transformer_impl=transformer_impl,
        fp8=fp8,
        gradient_accumulation_fusion=config.train.gradient_accumulation_fusion,
        deterministic=config.train.deterministic,
    )


def build_stage(
    config: RunConfig,
    layout: Layout,
    groups: ProcessGroupCollection,
    dtype: torch.dtype,
    device: torch.device,
    transformer_impl: Literal["local", "transformer_engine"] = "local",
    fp8: Fp8 | None = None,
) -> PLTModel:
    """Build this rank's part of the model, with uninitialised weights."""
    transformer = describe_layers(config, dtype, transformer_impl, fp8)
    is_cut = layout.context_parallel_size > 1 or layout.sequence_parallel
    return PLTModel(
        config.model,
        transformer,
        groups,
        stage_parts(layout, config.model.num_layers, dist.get_rank()),
        CutSlots(config.data.sequence_length, layout, groups, device) if is_cut else None,
    )


class Pipeline:
    """Runs micro batches through this rank's part of the model."""

    def __init__(
        self,
        stage: PLTModel,
        ddp: DistributedDataParallel,
        layout: Layout,
        groups: ProcessGroupCollection,
        sequence_length: int,
        device: torch.device,
    ):
        """Prepare the schedule.

        Args:
            stage: this rank's part of the model.
            ddp: the same in its wrapper; gradients gather in its buffers.
            layout: sizes.
            groups: process groups.
            sequence_length: slots of a whole sequence.
            device: where batches are moved to.
        """
        self._stage, self._ddp, self.layout, self._groups = stage, ddp, layout, groups
        self._sequence_length, self._device = sequence_length, device
        self.lending = Lending()
        self.events: list[Event] = []
        """What the stages of a pipeline did in the last step, in order."""
        config = stage.config
        config.finalize_model_grads_func = self._finalize
        config.no_sync_func = ddp.no_sync
        keep_flags_down(ddp)
        self._chunks: list[LoopChunk] = []
        if layout.pipeline_parallel_size > 1:
            self._build_chunks()

    def _build_chunks(self) -> None:
        layout, config = self.layout, self._stage.config
        self._chunks = [
            LoopChunk(self._stage, loop, chunk, self.lending, self.events.append)
            for loop in range(1, layout.num_loops + 1)
            for chunk in range(layout.model_chunks_per_stage)
        ]
        if layout.loop_chunks > 1:
            config.virtual_pipeline_model_parallel_size = layout.loop_chunks
            config.microbatch_group_size_per_vp_stage = group_size(
                layout.pipeline_parallel_size, layout.micro_batches
            )
            # Batched messages between the same two ranks change places in interleaved schedules
            # with two stages, and gradients are wrong without a word.
            config.overlap_p2p_comm, config.batch_p2p_comm = True, False
        config.deallocate_pipeline_outputs = True

    def run(self, batches: Sequence[Batch], forward_only: bool) -> Tensor:
        """Run one step's micro batches, and finish the gradients unless ``forward_only``.

        Returns:
            [summed loss, loss tokens] of this rank in float64: zeros where another rank of the
            same sequences reports them.
        """
        self.events.clear()
        for chunk in self._chunks:
            chunk.begin_step()
        # Megatron's schedules ask the models they are given, and a chunk owns no weights: without
        # this a pipeline would go on with the FP8 copies of the first step's weights.
        begin_step(self._stage)
        virtual = self.layout.loop_chunks if self.layout.loop_chunks > 1 else None
        stages = self.layout.pipeline_parallel_size
        schedule = get_forward_backward_func(pp_size=stages, vp_size=virtual)
        iterators = [iter(batches) for _ in self._chunks or [self._ddp]]
        several = len(iterators) > 1
        models: list[Any] = list(self._chunks) or [self._ddp]
        self._ddp.train(not forward_only)
        try:
            reports = schedule(
                forward_step_func=self._forward_step,
                data_iterator=iterators if several else iterators[0],
                model=models if several else models[0],
                num_microbatches=len(batches),
                seq_length=self._sequence_length,
                micro_batch_size=self.layout.micro_batch_size,
                forward_only=forward_only,
                p2p_communicator=P2PCommunicator(self._groups.pp, self._stage.config),
                pg_collection=self._groups,
            )
        finally:
            leftover = len(self.lending)
            self.lending.clear()
            self._ddp.train()
        assert not leftover, f"{leftover} micro batches of loop 1 were never handed back"
        if not reports or self._groups.tp.rank() > 0:
            return torch.zeros(2, dtype=torch.float64, device=self._device)
        return torch.stack(reports).sum(0)

    def _forward_step(self, batches: Any, model: Any) -> tuple[Tensor, Callable[..., Any]]:
        output, mask_bs = forward_micro_batch(self._stage, model, next(batches), self._device)
        return output, partial(sum_loss, mask_bs)

    def _finalize(self, model: Any, *arguments: Any, **options: Any) -> None:
        """Reduce the gradients of the one wrapper that owns them, whatever the chunks."""
        finalize_model_grads([self._ddp], *arguments, **options)


def forward_micro_batch(
    stage: PLTModel, model: Callable[..., Tensor], batch: Batch, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Give this rank's slots of a micro batch to ``model``, which is ``stage`` or wraps it.

    Returns:
        What ``model`` returns, and the loss mask [b, s] of those slots.
    """
    batch = {n: t.to(device, non_blocking=True) for n, t in batch.items()}
    loss_tokens = batch["loss_mask"].sum()
    if isinstance(stage.slots, CutSlots):
        batch = {name: stage.slots.take(tensor) for name, tensor in batch.items()}
    output = model(batch["tokens"], batch["position_ids"], batch["labels"], loss_tokens)
    return output, batch["loss_mask"]


def sum_loss(mask_bs: Tensor, losses_bs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the summed loss, its tokens, and both for the log."""
    total, tokens = (at_least_float32(losses_bs) * mask_bs).sum(), mask_bs.sum()
    # Masked slots too: NaN * 0 is NaN, and a broken model must not hide behind the mask.
    report = torch.stack([total.detach().double(), tokens.double()])
    return total, tokens.int(), report
