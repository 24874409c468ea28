"""The launcher under all multi-process tests: results, failures and hangs reach the test."""

import time

import pytest

from tests.launch import RankError, Ranks, run_distributed

pytestmark = pytest.mark.distributed
CASES = "tests.distributed.launch_cases"


def test_results_in_rank_order_from_the_same_processes_then_a_failure_with_its_traceback():
    with Ranks(2, megatron=False, env={"SPECIAL": "yes"}) as ranks:
        first = ranks.run(f"{CASES}:sum_of_ranks", scale=1)
        second = ranks.run(f"{CASES}:sum_of_ranks", scale=10)
        assert [r[:2] for r in first] == [(0, 1.0), (1, 1.0)]
        assert [r[:2] for r in second] == [(0, 10.0), (1, 10.0)]
        assert [r[2] for r in first] == [r[2] for r in second]

        begin = time.monotonic()
        with pytest.raises(RankError) as failure:
            ranks.run(f"{CASES}:fail_on", rank=1, timeout_s=90)
        assert time.monotonic() - begin < 60, "must not wait for the time-out"
        assert "ValueError: rank 1 had enough" in str(failure.value)
        assert "fail_on" in str(failure.value) and "last words" in str(failure.value)

        assert ranks.run(f"{CASES}:variable", name="SPECIAL") == ["yes", "yes"]
        assert ranks.run(f"{CASES}:variable", name="OMP_NUM_THREADS") == ["1", "1"]


@pytest.mark.parametrize("forked", [False, True], ids=["started", "forked"])
def test_dead_and_hanging_ranks_are_named(forked, nursery):
    with Ranks(2, megatron=False, nursery=nursery if forked else None) as ranks:
        assert [r[:2] for r in ranks.run(f"{CASES}:sum_of_ranks", scale=1)] == [(0, 1.0), (1, 1.0)]
        with pytest.raises(RankError, match="rank 1 died with exit status 7"):
            ranks.run(f"{CASES}:die_on", rank=1)
        with pytest.raises(RankError, match="no answer after 2 s[^$]*rank 0: still running"):
            ranks.run(f"{CASES}:sleep", seconds=100, timeout_s=2)
        with pytest.raises(RankError, match="rank 0 died with exit status -9"):
            ranks.run(f"{CASES}:kill_on", rank=0)


def test_fresh_ranks_have_megatron_without_a_gpu():
    assert run_distributed(1, f"{CASES}:megatron_is_there") == [True]
