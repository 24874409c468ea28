"""How much of a stage's activations is alive at a time: the order of work, played with bytes."""

from collections.abc import Callable
from functools import lru_cache

from pltmoe.parallel.layout import Layout
from pltmoe.parallel.schedule import Operation, build_schedule, group_size


def peak_bytes(
    layout: Layout,
    stage: int,
    chunk_bytes: Callable[[int, int], float],
    lent_gradients: Callable[[int], float],
) -> tuple[float, int]:
    """Return the most bytes alive on ``stage``, and how many loop chunks are alive then.

    Args:
        layout: sizes.
        stage: from 0.
        chunk_bytes: (loop, model chunk) -> bytes from its forward to its backward pass.
        lent_gradients: model chunk -> bytes that wait from the last loop's backward pass to loop
            1's.
    """
    most, chunks_then, now, alive = 0.0, 0, 0.0, 0
    for op in _order(layout)[stage]:
        bytes_of = chunk_bytes(op.loop, op.chunk)
        if op.kind == "F":
            now, alive = now + bytes_of, alive + 1
        else:  # a layer leaves its gradients where its activations were
            now, alive = now - bytes_of, alive - 1
            if op.loop == layout.num_loops > 1:
                now += lent_gradients(op.chunk)
            elif op.loop == 1 < layout.num_loops:
                now -= lent_gradients(op.chunk)
        if now > most:
            most, chunks_then = now, alive
    return most, chunks_then


def _order(layout: Layout) -> tuple[tuple[Operation, ...], ...]:
    stages, chunks = layout.pipeline_parallel_size, layout.model_chunks_per_stage
    return _cached_order(stages, layout.num_loops, chunks, _enough(layout))


def _enough(layout: Layout) -> int:
    """Return a number of micro batches with the same peak: later groups only repeat."""
    stages, count = layout.pipeline_parallel_size, layout.micro_batches
    if stages == 1:
        return 1
    if layout.loop_chunks == 1:
        return min(count, 2 * stages)
    size = group_size(stages, count)
    return min(count, 3 * size + count % size)


@lru_cache(maxsize=256)
def _cached_order(
    stages: int, loops: int, chunks: int, count: int
) -> tuple[tuple[Operation, ...], ...]:
    return tuple(tuple(stage) for stage in build_schedule(stages, loops, chunks, count))
