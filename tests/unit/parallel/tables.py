"""What tests count in the tables of parallel/schedule.py."""

from pltmoe.parallel.schedule import Operation, Timed, group_size


def in_flight(order: list[Operation]) -> int:
    """Return the most loop chunks whose activations a stage keeps at a time (from F to B)."""
    now = most = 0
    for op in order:
        now += 1 if op.kind == "F" else -1
        most = max(most, now)
    return most


def most_lent(order: list[Operation], loops: int) -> int:
    """Return the most (micro batch, chunk) pairs whose loop 1 lends K and V at a time."""
    if loops == 1:
        return 0
    return in_flight([op for op in order if op.loop == 1])


def lent_times(row: list[Timed], loops: int) -> dict[tuple[int, int], float]:
    """Return how long a stage keeps what loop 1 lends, per (micro batch, chunk).

    From the end of loop 1's forward to the end of loop 2's backward, which hands back the last of
    the gradients; in evaluation to the end of the last loop's forward. Empty without later loops.
    """
    if loops == 1:
        return {}
    trains = any(timed.operation.kind == "B" for timed in row)
    last = ("B", 2) if trains else ("F", loops)
    begin, end = {}, {}
    for timed in row:
        op = timed.operation
        if (op.kind, op.loop) == ("F", 1):
            begin[op.micro_batch, op.chunk] = timed.end
        elif (op.kind, op.loop) == last:
            end[op.micro_batch, op.chunk] = timed.end
    return {key: end[key] - begin[key] for key in begin}


def in_flight_bound(stages: int, loops: int, chunks: int, micro_batches: int, stage: int) -> int:
    """Return a bound on ``in_flight`` in closed form, which tests hold the tables to."""
    virtual, total = loops * chunks, loops * chunks * micro_batches
    if stages == 1:
        return loops
    if virtual == 1:
        return min(micro_batches, stages - stage)
    size = group_size(stages, micro_batches)
    return min(total, (stages - 1 - stage) * 2 + (virtual - 1) * size + 1)
