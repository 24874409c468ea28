"""What must hold for every layout and schedule, whatever the sizes."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pltmoe.parallel.layout import Layout
from pltmoe.parallel.schedule import (
    Operation,
    build_schedule,
    measured_bubble,
    naive_bubble_fraction,
    naive_schedule,
    simulate,
    step_time,
)
from tests.unit.parallel.tables import in_flight, lent_times

PIPELINES = st.tuples(
    st.integers(2, 5), st.integers(1, 3), st.integers(1, 3), st.integers(0, 6)
).map(lambda x: (*x[:3], x[0] + x[3]))
SIZES = st.integers(1, 4)


@settings(deadline=None)
@given(PIPELINES)
def test_naive_way_never_waits_less(shape):
    stages, loops, chunks, micro_batches = shape
    ours = simulate(build_schedule(*shape))
    naive = simulate(naive_schedule(*shape), naive=True)
    assert measured_bubble(naive) == pytest.approx(
        naive_bubble_fraction(stages, chunks, micro_batches)
    )
    if micro_batches % stages == 0:
        busy = 3 * loops * chunks * micro_batches
        assert step_time(naive) - busy == pytest.approx(loops * (step_time(ours) - busy))
        for order, other in zip(
            build_schedule(*shape), naive_schedule(*shape), strict=True
        ):  # it also keeps everything
            assert in_flight(order) <= in_flight(other) == loops * chunks * micro_batches


@settings(deadline=None)
@given(PIPELINES, st.integers(0, 4), st.floats(0.1, 3), st.floats(0.1, 3))
def test_no_stage_starts_before_what_it_needs_has_arrived(shape, message, forward, backward):
    """Slow messages and stages of unequal speed delay a step, and never stop it."""

    def takes(stage, op):
        return (1 + stage % 2) * (forward if op.kind == "F" else backward)

    played = simulate(build_schedule(*shape), takes, message=message)
    end = {(s, t.operation): t.end for s, row in enumerate(played) for t in row}
    start = {(s, t.operation): t.start for s, row in enumerate(played) for t in row}
    for (stage, op), begins in start.items():
        before = stage - 1 if op.kind == "F" else stage + 1
        if 0 <= before < shape[0]:
            assert begins >= end[before, op] + message
    stages, loops, chunks, micro_batches = shape
    visits = [(loop, chunk) for loop in range(1, loops + 1) for chunk in range(chunks)]
    for m in range(micro_batches):  # from the last stage back to the first, and the other way
        for now, then in zip(visits, visits[1:], strict=False):
            f, b = Operation("F", *then, m), Operation("B", *now, m)
            assert start[0, f] >= end[stages - 1, Operation("F", *now, m)] + message
            assert start[stages - 1, b] >= end[0, Operation("B", *then, m)] + message
    assert step_time(played) >= step_time(simulate(build_schedule(*shape), takes))


@settings(deadline=None)
@given(PIPELINES, st.booleans())
def test_what_loop_1_lends_comes_back(shape, forward_only):
    stages, loops, chunks, micro_batches = shape
    played = simulate(build_schedule(*shape, forward_only=forward_only))
    for row in played:
        times = lent_times(row, loops)
        assert len(times) == (chunks * micro_batches if loops > 1 else 0)
        # Loops 2..L go forward through everything at least once, loops L..3 and 2 come back to
        # the same place: (L-1) trips of vP chunks forward, (L-2) back, and this chunk's own.
        trip = chunks * stages
        least = (loops - 1) * trip if forward_only else (loops - 1 + 2 * (loops - 2)) * trip + 2
        assert all(time >= least for time in times.values())


@given(SIZES, SIZES, SIZES, SIZES, SIZES, SIZES)
def test_every_sequence_of_a_global_batch_is_read_once(tp, cp, pp, dp, micro, micro_batches):
    layout = Layout(
        world_size=tp * cp * pp * dp,
        micro_batch_size=micro,
        global_batch_size=micro * micro_batches * dp,
        tensor_parallel_size=tp,
        context_parallel_size=cp,
        pipeline_parallel_size=pp,
    )
    assert (layout.data_parallel_size, layout.micro_batches) == (dp, micro_batches)
    readers = {layout.coordinates(rank).data for rank in range(layout.world_size)}
    sequences = len(readers) * layout.micro_batches * layout.micro_batch_size
    assert sequences == layout.global_batch_size
