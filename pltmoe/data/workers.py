"""Worker processes for preprocessing: shared progress, quick stop, no orphans.

Processes are spawned, not forked, so that a caller with threads is safe; the modules they import
are light (no torch). One worker means: no process, the same functions run here.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import chain
from types import TracebackType
from typing import Any, Protocol, Self

from pltmoe.data.sources import Report
from pltmoe.errors import DataError

_POLL_SECONDS = 0.2
_MOST_FUTURES = 1000
"""More tasks than this go in groups: each future has its price, and each look goes over all."""

_shared: Any = None  # in a worker: (bytes done, whether to stop)


class Bar(Protocol):
    """The part of tqdm that is used here."""

    n: float

    def update(self, n: float) -> object:
        """Advance by ``n``."""


class _StoppedError(Exception):
    """Raised inside a worker when another task has failed."""


class Workers:
    """A pool that runs ``function(task, report)`` over tasks and returns results in their order."""

    def __init__(self, count: int):
        self._pool: ProcessPoolExecutor | None = None
        if count > 1:
            context = multiprocessing.get_context("spawn")
            self._done, self._stop = context.Value("q", 0), context.Value("b", 0)
            self._pool = ProcessPoolExecutor(
                count, context, initializer=_start_worker, initargs=((self._done, self._stop),)
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        if self._pool:
            self._stop.value = 1
            self._pool.shutdown(cancel_futures=True)

    def run[Task, Result](
        self, function: Callable[[Task, Report], Result], tasks: Sequence[Task], bar: Bar
    ) -> list[Result]:
        """Run all tasks; ``bar`` advances by the bytes they report.

        Raises:
            DataError: of the first task that failed, or a worker process was killed.
        """
        if not self._pool:
            return [function(task, bar.update) for task in tasks]
        before = self._done.value - bar.n  # a short task may be done before the next line is
        size = -(-len(tasks) // _MOST_FUTURES) or 1
        groups = [tasks[first : first + size] for first in range(0, len(tasks), size)]
        futures = [self._pool.submit(_call, function, group) for group in groups]
        try:
            return list(chain.from_iterable(self._collect(futures, bar, before)))
        except BrokenProcessPool:
            raise DataError(
                "a worker process was killed (out of memory?): use fewer workers and run the same "
                "command again, it continues"
            ) from None
        finally:  # after an error nobody may still be writing when the caller tidies up
            self._stop.value = 1
            wait([future for future in futures if not future.cancel()])
            self._stop.value = 0

    def _collect[Result](
        self, futures: list[Future[Result]], bar: Bar, before: float
    ) -> list[Result]:
        pending: set[Future[Result]] = set(futures)
        while pending:
            done, pending = wait(pending, _POLL_SECONDS, FIRST_EXCEPTION)
            bar.update(self._done.value - before - bar.n)
            for future in futures:
                if future in done:
                    future.result()
        return [future.result() for future in futures]


def _start_worker(shared: tuple[Any, Any]) -> None:
    global _shared
    _shared = shared
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_follow_parent, daemon=True).start()


def _follow_parent() -> None:
    """End with the parent: a pool's worker would otherwise wait for ever after ``kill -9``."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _call[Task, Result](
    function: Callable[[Task, Report], Result], tasks: Sequence[Task]
) -> list[Result]:
    return [function(task, _report) for task in tasks]


def _report(size: int) -> None:
    done, stop = _shared
    if stop.value:
        raise _StoppedError
    with done.get_lock():
        done.value += size
