"""The pipeline's table: Megatron's order, nothing lost, no deadlock, memory bounded."""

from collections import Counter
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pltmoe.parallel.schedule import (
    Operation,
    bubble_fraction,
    build_schedule,
    group_size,
    measured_bubble,
    simulate,
    step_time,
)
from tests.unit.parallel.tables import in_flight, in_flight_bound, most_lent

SHAPES = st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(1, 3), st.integers(0, 7)).map(
    lambda x: (x[0], x[1], x[2] if x[0] > 1 else 1, x[0] + x[3])
)


@settings(deadline=None, max_examples=150)
@given(SHAPES)
def test_every_chunk_once_forward_once_backward_and_nobody_waits_for_ever(shape):
    stages, loops, chunks, micro_batches = shape
    schedule = build_schedule(*shape)
    wanted = {
        Operation(kind, loop, chunk, m)
        for kind in "FB"
        for loop in range(1, loops + 1)
        for chunk in range(chunks)
        for m in range(micro_batches)
    }
    for order in schedule:
        assert Counter(order) == dict.fromkeys(wanted, 1)
    played = simulate(schedule)  # raises on a deadlock
    for stage, (order, timed) in enumerate(zip(schedule, played, strict=True)):
        assert in_flight(order) <= in_flight_bound(*shape, stage)
        assert most_lent(order, loops) <= min(in_flight(order), chunks * micro_batches)
        for before, after in zip(timed, timed[1:], strict=False):
            assert before.end <= after.start
    order = schedule[0]
    for m in range(micro_batches):  # lent gradients come back in the order that loop 1 needs
        backward = [op.loop for op in order if op.kind == "B" and op.micro_batch == m]
        assert backward == sorted(backward, reverse=True)


@settings(deadline=None, max_examples=60)
@given(SHAPES)
def test_evaluation_runs_every_chunk_once(shape):
    for order in build_schedule(*shape, forward_only=True):
        assert {op.kind for op in order} == {"F"} and len(set(order)) == len(order)
    simulate(build_schedule(*shape, forward_only=True))


@pytest.mark.parametrize("stages", [2, 3, 4, 8])
@pytest.mark.parametrize("loops", [1, 2, 3])
@pytest.mark.parametrize("chunks", [1, 2])
def test_bubble_is_the_closed_form(stages, loops, chunks):
    """That of one pipeline per loop: test_properties.py."""
    m = 2 * stages
    played = simulate(build_schedule(stages, loops, chunks, m))
    assert measured_bubble(played) == pytest.approx(bubble_fraction(stages, loops, chunks, m))


@pytest.mark.parametrize(
    "shape", [(2, 1, 1, 1), (4, 1, 1, 6), (2, 2, 1, 2), (2, 3, 2, 5), (4, 2, 1, 8), (4, 2, 2, 9)]
)
def test_order_is_megatrons(shape):
    """Warm-up counts and the order of micro batches, from Megatron-core's own functions."""
    from megatron.core.pipeline_parallel.schedules import (
        get_pp_rank_microbatches,
        get_schedule_table,
    )

    stages, loops, chunks, micro_batches = shape
    virtual = loops * chunks
    size = group_size(stages, micro_batches) if virtual > 1 else 1
    for stage, order in enumerate(build_schedule(*shape)):
        communicator = SimpleNamespace(
            pp_group=SimpleNamespace(size=lambda: stages, rank=lambda stage=stage: stage),
            virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        )
        total, _, warm_up, _ = get_pp_rank_microbatches(
            micro_batches, virtual, size, p2p_communicator=communicator
        )
        kinds = "".join(op.kind for op in order)
        assert kinds == "F" * warm_up + "FB" * (total - warm_up) + "B" * warm_up
        forward = [(op.micro_batch, _place(op, chunks)) for op in order if op.kind == "F"]
        backward = [(op.micro_batch, _place(op, chunks)) for op in order if op.kind == "B"]
        table = get_schedule_table(micro_batches, virtual, size)
        assert forward == table
        assert backward == [(m, virtual - 1 - chunk) for m, chunk in table]


def _place(op: Operation, chunks: int) -> int:
    return (op.loop - 1) * chunks + op.chunk


def test_group_size_is_the_smallest_that_megatron_accepts():
    assert [group_size(2, m) for m in (2, 3, 4, 5, 7)] == [2, 3, 2, 3, 4]
    assert group_size(4, 8) == 4 and group_size(4, 9) == 5


def test_what_waits_for_ever_is_noticed():
    schedule = build_schedule(2, 2, 1, 2)
    schedule[0] = schedule[0][::-1]
    with pytest.raises(AssertionError, match="deadlock"):
        simulate(schedule)


def test_a_message_takes_time_between_stages_only():
    played = simulate(build_schedule(2, 1, 1, 1), message=0.5)
    assert step_time(played) == 1 + 0.5 + 1 + 2 + 0.5 + 2
    assert played[0][0].end == 1
