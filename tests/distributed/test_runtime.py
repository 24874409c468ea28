"""Collectives of the runtime on two real processes: nobody waits for a rank that failed."""

import socket

import pytest

pytestmark = [pytest.mark.distributed, pytest.mark.xdist_group(__name__)]
CASES = "tests.distributed.runtime_cases"


def test_collectives(warm_ranks):
    first, second = warm_ranks(2, f"{CASES}:collectives")
    assert first == {"highest": 2.5, "shared": "from rank 0", "kept": 10, "main": True}
    assert second == {"highest": 2.5, "shared": "from rank 0", "kept": None, "main": False}


def test_an_error_of_rank_zero_reaches_all(warm_ranks):
    seen = warm_ranks(2, f"{CASES}:failing_on_main", error="user")
    assert seen == ["DataError: corpus: empty"] * 2
    seen = warm_ranks(2, f"{CASES}:failing_on_main", error="odd")
    assert seen == ["RuntimeError: on rank 0: OddError: 1 and 2"] * 2


def test_one_rank_speaks(warm_ranks):
    assert warm_ranks(2, f"{CASES}:who_speaks", only_rank=None) == [True, False]
    assert warm_ranks(2, f"{CASES}:who_speaks", only_rank=1) == [None, True]


def test_ranks_with_and_without_a_gpu_do_not_train_together(warm_ranks):
    one = warm_ranks(2, f"{CASES}:without_gpu", ranks=[1])
    assert one[0] == one[1]
    assert one[0].startswith(f"no GPU is seen by rank 1 on {socket.gethostname()}, but by others:")
    for all_or_none in ([], [0, 1]):
        assert warm_ranks(2, f"{CASES}:without_gpu", ranks=all_or_none) == ["nothing"] * 2
