"""The order of work of a pipeline with loops, as a table. Pure.

A loop chunk is one loop through one model chunk of a stage: Megatron's virtual pipeline stage.
A micro batch visits them in this order, every one on all stages:

    loop 1: chunk 0 .. chunk v-1    loop 2: chunk 0 .. chunk v-1    ...    loop L

``build_schedule`` lists what each stage does, in the order of Megatron-core's interleaved 1F1B
(``pipeline_parallel/schedules.py``); ``simulate`` plays it with given durations. With P stages and
M micro batches the stages wait (P-1)/(v L M + P-1) of the time: the pipeline fills and drains once.
Running L pipelines one after another ("naive") fills and drains for every loop.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Operation:
    """One forward (F) or backward (B) of one loop chunk of one micro batch on a stage."""

    kind: Literal["F", "B"]
    loop: int
    """From 1."""
    chunk: int
    """Model chunk, from 0."""
    micro_batch: int
    """From 0."""


@dataclass(frozen=True)
class Timed:
    """An operation with its time, in units of the given durations."""

    operation: Operation
    start: float
    end: float


Schedule = list[list[Operation]]
"""Operations of each stage, in order."""


def group_size(stages: int, micro_batches: int) -> int:
    """Return how many micro batches a stage takes through a loop chunk before the next chunk.

    The smallest that Megatron accepts: at least ``stages``, and no remainder between 0 and that
    (``microbatch_group_size_per_vp_stage``). More would keep more activations.
    """
    assert micro_batches >= stages, "layout_for refuses this"
    sizes = range(stages, micro_batches + 1)
    return next(n for n in sizes if micro_batches % n == 0 or micro_batches % n >= stages)


def build_schedule(
    stages: int, loops: int, chunks: int, micro_batches: int, forward_only: bool = False
) -> Schedule:
    """Return what every stage does in one step, in order."""
    virtual = loops * chunks
    if stages == 1:
        return [_one_stage(loops, micro_batches, forward_only)]
    if virtual == 1:
        forward = [(0, m) for m in range(micro_batches)]
        warm_up = [stages - 1 - stage for stage in range(stages)]
    else:
        size = group_size(stages, micro_batches)
        forward = [
            (chunk, m)
            for begin in range(0, micro_batches, size)
            for chunk in range(virtual)
            for m in range(begin, _end_of_group(begin, size, micro_batches))
        ]
        warm_up = [(stages - 1 - stage) * 2 + (virtual - 1) * size for stage in range(stages)]
    backward = [(virtual - 1 - chunk, m) for chunk, m in forward]
    f = [Operation("F", c // chunks + 1, c % chunks, m) for c, m in forward]
    b = [Operation("B", c // chunks + 1, c % chunks, m) for c, m in backward]
    if forward_only:
        return [list(f) for _ in range(stages)]
    return [_interleave(f, b, min(first, len(f))) for first in warm_up]


def _end_of_group(begin: int, size: int, micro_batches: int) -> int:
    return min(begin + size, micro_batches)


def _interleave(f: list[Operation], b: list[Operation], warm_up: int) -> list[Operation]:
    """Forward passes first, then one forward and one backward in turn, then the rest."""
    steady = [op for pair in zip(f[warm_up:], b, strict=False) for op in pair]
    return [*f[:warm_up], *steady, *b[len(f) - warm_up :]]


def _one_stage(loops: int, micro_batches: int, forward_only: bool) -> list[Operation]:
    order: list[Operation] = []
    for m in range(micro_batches):
        order += [Operation("F", loop, 0, m) for loop in range(1, loops + 1)]
        if not forward_only:
            order += [Operation("B", loop, 0, m) for loop in range(loops, 0, -1)]
    return order


def naive_schedule(stages: int, loops: int, chunks: int, micro_batches: int) -> Schedule:
    """Return L pipelines one after another: every loop fills and drains all stages.

    Forward passes of loop 1 for all micro batches, then of loop 2, ...; backward the other way.
    ``simulate(naive=True)`` adds the waiting between loops.
    """
    order = [
        Operation("F", loop, chunk, m)
        for loop in range(1, loops + 1)
        for chunk in range(chunks)
        for m in range(micro_batches)
    ]
    order += [
        Operation("B", loop, chunk, m)
        for loop in range(loops, 0, -1)
        for chunk in range(chunks - 1, -1, -1)
        for m in range(micro_batches)
    ]
    return [list(order) for _ in range(stages)]


Duration = Callable[[int, Operation], float]


def simulate(
    schedule: Schedule,
    duration: Duration | None = None,
    naive: bool = False,
    message: float = 0.0,
) -> list[list[Timed]]:
    """Play a schedule: when each stage does what.

    Args:
        schedule: operations of each stage.
        duration: (stage, operation) -> time; forward 1 and backward 2 by default.
        naive: a loop begins when all stages have finished the one before.
        message: time from the end of an operation to the start of the next stage's.

    Raises:
        AssertionError: an operation waits for something that never comes.
    """
    takes = duration or (lambda stage, op: 1.0 if op.kind == "F" else 2.0)
    chunks = 1 + max(op.chunk for op in schedule[0])
    loops = max(op.loop for op in schedule[0])
    done: dict[tuple[int, Operation], float] = {}
    played: list[list[Timed]] = [[] for _ in schedule]
    rounds = _rounds(schedule) if naive else {}
    while any(len(p) < len(s) for p, s in zip(played, schedule, strict=True)):
        moved = False
        for stage, (past, order) in enumerate(zip(played, schedule, strict=True)):
            while len(past) < len(order):
                op = order[len(past)]
                before = _needs(stage, op, len(schedule), loops, chunks)
                barrier = _barrier(rounds[op.kind, op.loop], played) if naive else 0.0
                if barrier is None or any(need not in done for need in before):
                    break
                arrived = (done[n] + (message if n[0] != stage else 0.0) for n in before)
                start = max([past[-1].end if past else 0.0, barrier, *arrived])
                past.append(Timed(op, start, start + takes(stage, op)))
                done[stage, op] = past[-1].end
                moved = True
        assert moved, "deadlock: every stage waits"
    return played


def _needs(
    stage: int, op: Operation, stages: int, loops: int, chunks: int
) -> list[tuple[int, Operation]]:
    """Return what must be finished before ``op``: on which stage, which operation."""
    place = (op.loop - 1) * chunks + op.chunk

    def at(kind: Literal["F", "B"], place: int) -> Operation:
        return Operation(kind, place // chunks + 1, place % chunks, op.micro_batch)

    if op.kind == "F":
        if stage > 0:
            return [(stage - 1, op)]
        return [(stages - 1, at("F", place - 1))] if place else []
    needs = [(stage, at("F", place))]
    if op.loop < loops:  # gradients of what loop 1 lent come from the later loops on this stage
        needs.append((stage, at("B", place + chunks)))
    if stage < stages - 1:
        needs.append((stage + 1, op))
    elif place < loops * chunks - 1:
        needs.append((0, at("B", place + 1)))
    return needs


def _rounds(schedule: Schedule) -> dict[tuple[str, int], list[int]]:
    """Return for each round (F or B, loop) how many operations each stage does before it."""
    rounds: dict[tuple[str, int], list[int]] = {}
    for stage, order in enumerate(schedule):
        for index, op in enumerate(order):
            before = rounds.setdefault((op.kind, op.loop), [0] * stage)
            if len(before) == stage:
                before.append(index)
    return rounds


def _barrier(before: list[int], played: list[list[Timed]]) -> float | None:
    """Return when every stage has done as many operations as ``before`` says; None: not yet."""
    latest = 0.0
    for past, count in zip(played, before, strict=True):
        if len(past) < count:
            return None
        if count:
            latest = max(latest, past[count - 1].end)
    return latest


def step_time(played: list[list[Timed]]) -> float:
    """Return when the last stage is done."""
    return max(stage[-1].end for stage in played)


def measured_bubble(played: list[list[Timed]]) -> float:
    """Return the share of the stages' time in which they wait."""
    total = step_time(played)
    busy = sum(timed.end - timed.start for stage in played for timed in stage)
    return 1 - busy / (total * len(played))


def bubble_fraction(stages: int, loops: int, chunks: int, micro_batches: int) -> float:
    """Return the share of a stage's time spent waiting: (P-1) / (v L M + P-1)."""
    return (stages - 1) / (chunks * loops * micro_batches + stages - 1)


def naive_bubble_fraction(stages: int, chunks: int, micro_batches: int) -> float:
    """Return the same for L pipelines one after another, each paying its own: (P-1)/(v M + P-1)."""
    return (stages - 1) / (chunks * micro_batches + stages - 1)
