"""The pool: order, progress, a quick end after an error, and word of killed workers."""

import time

import pytest

from pltmoe.data.workers import Workers
from pltmoe.errors import DataError
from tests.unit.data.worker_tasks import die, double, fail_on_three


class _Bar:
    n = 0.0

    def update(self, n: float) -> None:
        self.n += n


def test_results_in_order_and_progress_of_two_rounds_with_one_pool():
    for count in (1, 2):
        with Workers(count) as workers:
            for tasks in (list(range(9)), [5, 6]):
                bar = _Bar()
                assert workers.run(double, tasks, bar) == [2 * task for task in tasks]
                assert bar.n == sum(tasks)


def test_progress_of_tasks_that_are_done_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the caller has come to look at any of them."""
    with Workers(2) as workers:
        workers.run(double, [1, 2], _Bar())  # the processes run
        submit = workers._pool.submit

        def submit_and_wait(*arguments):
            future = submit(*arguments)
            future.result()
            return future

        monkeypatch.setattr(workers._pool, "submit", submit_and_wait)
        bar = _Bar()
        assert workers.run(double, [5, 6], bar) == [10, 12] and bar.n == 11


def test_many_small_tasks_share_futures(monkeypatch: pytest.MonkeyPatch) -> None:
    """100,000 small files spent 20 seconds more with two workers than with one."""
    with Workers(2) as workers:
        submit, submitted = workers._pool.submit, []
        monkeypatch.setattr(
            workers._pool, "submit", lambda *task: submitted.append(task) or submit(*task)
        )
        bar = _Bar()
        assert workers.run(double, range(2500), bar) == [2 * task for task in range(2500)]
        assert bar.n == sum(range(2500)) and len(submitted) <= 1000
        assert workers.run(double, [], bar) == []


def test_error_ends_the_other_tasks_soon():
    begin = time.monotonic()
    with Workers(2) as workers, pytest.raises(DataError, match="three is broken"):
        workers.run(fail_on_three, [1, 3, 5, 7], _Bar())
    assert time.monotonic() - begin < 30


def test_killed_worker():
    with Workers(2) as workers, pytest.raises(DataError, match="a worker process was killed"):
        workers.run(die, [1], _Bar())
