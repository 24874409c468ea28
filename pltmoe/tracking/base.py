"""What every tracker does, how several act as one, and how a run ends with the truth."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, Protocol

EndStatus = Literal["FINISHED", "FAILED", "KILLED"]
"""FINISHED: all steps done. FAILED: an error. KILLED: stopped from outside (SIGTERM, Ctrl-C)."""


class Tracker(Protocol):
    """Records one run. Lives on global rank 0 only; no call may wait for a network."""

    def start(self, tags: Mapping[str, str], resume_step: int | None = None) -> None:
        """Begin, or continue after the checkpoint of ``resume_step`` (None: from scratch)."""
        ...

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of one optimizer step, under the names in docs/metrics.md."""
        ...

    def artifact(self, path: Path) -> None:
        """Keep a file or directory with the run (config, report, plots)."""
        ...

    def finish(self, status: EndStatus) -> None:
        """End the run. Only the first call counts."""
        ...


class FanOut:
    """Several trackers behind one; called in the given order, ended in reverse."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = list(trackers)
        self._ended = False

    def start(self, tags: Mapping[str, str], resume_step: int | None = None) -> None:
        """Start every tracker."""
        for tracker in self._trackers:
            tracker.start(tags, resume_step=resume_step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log to every tracker."""
        for tracker in self._trackers:
            tracker.log(step, metrics)

    def artifact(self, path: Path) -> None:
        """Hand the file or directory to every tracker."""
        for tracker in self._trackers:
            tracker.artifact(path)

    def finish(self, status: EndStatus) -> None:
        """End every tracker, also when one of them cannot; a second call does nothing."""
        if self._ended:
            return
        self._ended = True
        error: Exception | None = None
        for tracker in reversed(self._trackers):
            try:
                tracker.finish(status)
            except Exception as problem:  # the others still have to end; raised below
                error = error or problem
        if error is not None:
            raise error
