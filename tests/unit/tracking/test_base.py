import subprocess
import sys
from pathlib import Path

import pytest

from pltmoe.tracking.base import FanOut


class Notes:
    """Writes down what it is told."""

    def __init__(self, error: Exception | None = None) -> None:
        self.calls: list[tuple] = []
        self._error = error

    def start(self, tags, resume_step=None):
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
    both.start({}, resume_step=3)
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


def test_tracking_never_imports_mlflow():
    """It costs seconds and hundreds of megabytes; only the process that sends pays."""
    code = "import sys, pltmoe.tracking, pltmoe.tracking.sync; assert 'mlflow' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])
