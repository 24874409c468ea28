"""Hands the metrics of a step to the tracker of the run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pltmoe.tracking import Tracker
from pltmoe.train.callbacks.base import Callback

if TYPE_CHECKING:
    from pltmoe.train.trainer import StepReport, Trainer


class Tracking(Callback):
    """Logs on the rank that has a tracker, which is rank 0."""

    def __init__(self, tracker: Tracker | None):
        self._tracker = tracker

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        """Log what earlier callbacks have put into the step's metrics."""
        if self._tracker is not None and report.metrics:
            self._tracker.log(report.step, report.metrics)
