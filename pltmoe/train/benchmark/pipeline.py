"""How long a pipelined step takes, against what the schedule table predicts for it.

The prediction knows how long each loop chunk's forward and backward pass takes on its stage, which
is measured alone (no messages, no waiting, but on all stages at the same time), and the order of
work. What it does not know is what messages and Megatron's bookkeeping cost.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from tqdm import tqdm

from pltmoe.config import RunConfig
from pltmoe.engines.megatron import MegatronEngine
from pltmoe.parallel.layout import Layout
from pltmoe.parallel.loop_chunks import LoopChunk
from pltmoe.parallel.schedule import (
    Operation,
    build_schedule,
    naive_schedule,
    simulate,
    step_time,
)
from pltmoe.parallel.shared_kv import Lending
from pltmoe.runtime import devices
from pltmoe.train.benchmark.candidates import random_batches
from pltmoe.train.benchmark.timing import Times, now

FORWARD_BACKWARD = "forward and backward"
PREDICTED = "predicted"
NAIVE = "predicted for one pipeline per loop"
WHOLE_STEP = "whole step, with the update"
_REPEATS = 3


@dataclass(frozen=True)
class ChunkSeconds:
    """One micro batch through one loop chunk of one stage."""

    forward: float
    backward: float


def measure_pipeline(
    config: RunConfig, layout: Layout, groups: ProcessGroupCollection, rounds: int, warm_up: int
) -> dict[str, Times]:
    """Predict and take ``warm_up`` + ``rounds`` steps; every rank gets the same times."""
    assert layout.tensor_parallel_size * layout.context_parallel_size == 1, "whole sequences only"
    engine = MegatronEngine(config, layout, groups)
    chunks, watch = LoneChunks(config, layout, engine), Stopwatch(engine)
    # Megatron shapes its scale of router losses in the first step: before any lone chunk.
    engine.train_step(random_batches(config, layout, 0), 1, watch=False)
    times = {name: Times([]) for name in (FORWARD_BACKWARD, PREDICTED, NAIVE, WHOLE_STEP)}
    total = warm_up + rounds
    for number in tqdm(range(1, total + 1), "pipeline", unit="step", disable=dist.get_rank() > 0):
        predicted = predict(layout, chunks.time_all_ranks())
        batches = list(random_batches(config, layout, number))
        dist.barrier()
        begin = now()
        loss = engine.train_step(iter(batches), number, watch=False).loss
        end = now()
        latest = _latest(watch.end - begin, end - begin)
        if number > warm_up:
            found = dict(zip(times, (latest[0], *predicted, latest[1]), strict=True))
            for name, seconds in found.items():
                times[name].seconds.append(seconds)
                times[name].losses.append(loss)
    return times


def predict(layout: Layout, seconds: list[list[ChunkSeconds]]) -> tuple[float, float]:
    """Return the seconds of a step from those of [stage][virtual stage].

    First as the stages work, then for L pipelines one after another.
    """

    def takes(stage: int, op: Operation) -> float:
        virtual = (op.loop - 1) * layout.model_chunks_per_stage + op.chunk
        times = seconds[stage][virtual]
        return times.forward if op.kind == "F" else times.backward

    sizes = (
        layout.pipeline_parallel_size,
        layout.num_loops,
        layout.model_chunks_per_stage,
        layout.micro_batches,
    )
    return (
        step_time(simulate(build_schedule(*sizes), takes)),
        step_time(simulate(naive_schedule(*sizes), takes, naive=True)),
    )


class Stopwatch:
    """Notes when forward and backward of an engine's step are done."""

    def __init__(self, engine: MegatronEngine):
        """Put itself around the engine's pipeline."""
        self.end = 0.0
        self._run = engine.pipeline.run
        engine.pipeline.run = self._timed  # type: ignore[method-assign]

    def _timed(self, *arguments: Any) -> Tensor:
        report = self._run(*arguments)
        self.end = now()
        return report


class LoneChunks:
    """The loop chunks of this rank, run without the other stages."""

    def __init__(self, config: RunConfig, layout: Layout, engine: MegatronEngine):
        """Borrow the weights of ``engine``; gradients gather in its buffers until its next step."""
        self._device, self._layout = devices.device(), layout
        self._is_first = layout.coordinates(dist.get_rank()).stage == 0
        lending = Lending()
        self._chunks = [
            LoopChunk(engine.model, loop, chunk, lending, lambda event: None)
            for loop in range(1, layout.num_loops + 1)
            for chunk in range(layout.model_chunks_per_stage)
        ]
        batch = next(random_batches(config, layout, 0))
        self._batch = {name: tensor.to(self._device) for name, tensor in batch.items()}
        b, s = self._batch["tokens"].shape
        self._shape = (s, b, config.model.hidden_size)
        self._dtype = devices.parameter_dtype(config.train.precision)

    def time_all_ranks(self) -> list[list[ChunkSeconds]]:
        """Return [stage][virtual stage]: means, and over the ranks that share a stage."""
        dist.barrier()
        runs = [self.time() for _ in range(_REPEATS)]
        ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, [_mean(chunk) for chunk in zip(*runs, strict=True)])
        return [
            [_mean(chunk) for chunk in zip(*self._of_stage(ranks, stage), strict=True)]
            for stage in range(self._layout.pipeline_parallel_size)
        ]

    def time(self) -> list[ChunkSeconds]:
        """Run one micro batch, all forward and then all backward passes; by virtual stage."""
        outputs, forward, backward = [], [], []
        for number, chunk in enumerate(self._chunks):
            chunk.begin_step()
            if not (self._is_first and number == 0):
                hidden = torch.randn(self._shape, device=self._device, dtype=self._dtype)
                chunk.set_input_tensor(hidden.requires_grad_())
            output, seconds = _timed(lambda chunk=chunk: self._forward(chunk))
            outputs.append(output)
            forward.append(seconds)
        for output in reversed(outputs):
            gradient = torch.randn_like(output)
            backward.append(_timed(lambda y=output, g=gradient: y.backward(g))[1])
        return [ChunkSeconds(*pair) for pair in zip(forward, reversed(backward), strict=True)]

    def _forward(self, chunk: LoopChunk) -> Tensor:
        batch = self._batch
        loss_tokens = batch["loss_mask"].sum()
        output = chunk(batch["tokens"], batch["position_ids"], batch["labels"], loss_tokens)
        return (output * batch["loss_mask"]).sum() if output.dim() == 2 else output

    def _of_stage(self, ranks: list[list[ChunkSeconds]], stage: int) -> list[list[ChunkSeconds]]:
        return [
            found
            for rank, found in enumerate(ranks)
            if self._layout.coordinates(rank).stage == stage
        ]


def _timed[T](action: Callable[[], T]) -> tuple[T, float]:
    begin = now()
    result = action()
    return result, now() - begin


def _mean(times: tuple[ChunkSeconds, ...]) -> ChunkSeconds:
    return ChunkSeconds(
        statistics.fmean(t.forward for t in times), statistics.fmean(t.backward for t in times)
    )


def _latest(*seconds: float) -> list[float]:
    """Return the highest of all ranks, each for itself."""
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, seconds)
    return [max(values) for values in zip(*ranks, strict=True)]
