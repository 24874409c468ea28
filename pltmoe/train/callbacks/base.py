"""The callback interface: every method may be left out."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pltmoe.train.trainer import StepReport, Trainer


class Callback:
    """Called on every rank; what belongs to rank 0 checks for it itself."""

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        """Look at a finished step; may add to ``report.metrics`` for the callbacks that follow."""

    def after_last_step(self, trainer: Trainer) -> None:
        """Run once when training ends: all steps are done, or a stop was asked for."""
