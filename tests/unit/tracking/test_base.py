import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pltmoe.tracking.base import FanOut, Terminated, ending


class Notes:
    """Writes down what it is told."""

    def __init__(self, error: Exception | None = None) -> None:
        self.calls: list[tuple] = []
        self._error = error

    def start(self, params, tags, resume_step=None):
        self.calls.append(("start", resume_step))

    def log(self, step, metrics):
        self.calls.append(("log", step))

    def artifact(self, path):
        self.calls.append(("artifact", path))

    def finish(self, status):
        self.calls.append(("finish", status))
        if self._error:
            raise self._error


def test_fan_out_tells_everyone_and_ends_once():
    first, second = Notes(), Notes()
    both = FanOut([first, second])
    both.start({}, {}, resume_step=3)
    both.log(4, {})
    both.artifact(Path("report.md"))
    both.finish("FAILED")
    both.finish("FINISHED")
    expected = [("start", 3), ("log", 4), ("artifact", Path("report.md")), ("finish", "FAILED")]
    assert first.calls == second.calls == expected


def test_one_tracker_that_cannot_end_does_not_keep_the_others():
    first, second = Notes(), Notes(OSError("disk full"))
    with pytest.raises(OSError, match="disk full"):
        FanOut([first, second]).finish("FINISHED")
    assert first.calls == [("finish", "FINISHED")]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (None, "FINISHED"),
        (ValueError("x"), "FAILED"),
        (SystemExit(1), "FAILED"),
        (KeyboardInterrupt(), "KILLED"),
    ],
)
def test_the_end_is_what_happened(error, status):
    notes = Notes()
    try:
        with ending(notes):
            if error:
                raise error
    except BaseException as seen:
        assert seen is error
    assert notes.calls == [("finish", status)]


def test_sigterm_is_killed_and_the_handler_goes_away():
    notes = Notes()
    with pytest.raises(Terminated) as seen, ending(notes):
        os.kill(os.getpid(), signal.SIGTERM)
    assert notes.calls == [("finish", "KILLED")]
    assert seen.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_handler_of_the_job_is_left_alone():
    seen = []
    signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        with ending(Notes()):
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert seen == [signal.SIGTERM]


def test_tracking_never_imports_mlflow():
    """It costs seconds and hundreds of megabytes; only the process that sends pays."""
    code = "import sys, pltmoe.tracking, pltmoe.tracking.sync; assert 'mlflow' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])
