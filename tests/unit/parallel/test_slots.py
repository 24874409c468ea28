"""Which slots a rank holds, and which few travel."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pltmoe.parallel.layout import Layout
from pltmoe.parallel.slots import (
    SlotExchange,
    context_segments,
    cut_slots,
    missing_before,
    slots_of,
)


def layout(cp: int, tp: int = 1, sequence_parallel: bool = True) -> Layout:
    return Layout(
        world_size=cp * tp,
        micro_batch_size=1,
        global_batch_size=1,
        tensor_parallel_size=tp,
        sequence_parallel=sequence_parallel and tp > 1,
        context_parallel_size=cp,
    )


def test_chunks_are_mirrored():
    assert context_segments(16, 2, 0) == ((0, 4), (12, 16))
    assert context_segments(16, 2, 1) == ((4, 8), (8, 12))
    assert context_segments(16, 1, 0) == ((0, 16),)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))
def test_every_slot_is_held_once_and_work_is_even(cp, tp, times):
    total = 2 * cp * tp * times
    cut = [cut_slots(total, layout(cp, tp), rank) for rank in range(cp * tp)]
    assert sorted(slot for _, residual in cut for slot in residual) == list(range(total))
    for rank, (attention, residual) in enumerate(cut):
        assert set(residual) <= set(attention)
        assert attention == cut[rank - rank % tp][0]  # tensor-parallel ranks attend together
    visible = {sum(slot + 1 for slot in attention) for attention, _ in cut}
    assert len(visible) == 1  # causal keys seen: the same for every rank


def test_without_sequence_parallelism_the_stream_is_not_cut():
    attention, residual = cut_slots(16, layout(2, 2, sequence_parallel=False), 1)
    assert attention == residual == [0, 1, 2, 3, 12, 13, 14, 15]


@pytest.mark.parametrize(("cp", "tp", "most"), [(2, 1, 1), (1, 4, 1), (4, 1, 2), (2, 2, 1)])
def test_only_the_slot_before_a_run_travels_for_the_shift(cp, tp, most):
    """At most one slot for each run of slots that a rank holds."""
    held = [cut_slots(32, layout(cp, tp), rank)[1] for rank in range(cp * tp)]
    wanted = [missing_before(slots, 1) for slots in held]
    for slots, missing in zip(held, wanted, strict=True):
        runs = [slot for slot in slots if slot - 1 not in slots]
        assert missing == [slot - 1 for slot in runs if slot > 0]
        assert len(missing) <= most
    exchanges = [SlotExchange(held, wanted, rank, None) for rank in range(cp * tp)]
    assert sum(sum(e.send_counts) for e in exchanges) == sum(len(m) for m in wanted)
    for a, one in enumerate(exchanges):
        for b, other in enumerate(exchanges):
            assert one.send_counts[b] == other.receive_counts[a]
            assert a != b or one.send_counts[b] == 0  # nothing is sent to oneself


def test_the_windows_halo_and_the_whole_past():
    first, second = (slots_of(context_segments(16, 2, rank)) for rank in (0, 1))
    assert missing_before(first, 3) == [9, 10, 11]
    assert missing_before(second, 3) == [1, 2, 3]
    assert missing_before(second, 100) == missing_before(second, None) == [0, 1, 2, 3]
    assert missing_before(first, None) == list(range(4, 12))
