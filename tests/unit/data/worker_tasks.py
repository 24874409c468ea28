"""Tasks for worker processes in test_workers.py."""

import os
import signal
import time
from collections.abc import Callable

from pltmoe.errors import DataError


def double(task: int, report: Callable[[int], None]) -> int:
    report(task)
    return 2 * task


def fail_on_three(task: int, report: Callable[[int], None]) -> int:
    if task == 3:
        raise DataError("three is broken")
    for _ in range(600):  # a minute, unless told to stop
        report(0)
        time.sleep(0.1)
    return task


def die(task: int, report: Callable[[int], None]) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return task
