"""Validation loss at intervals, always on the same sequences, so that values can be compared."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from pltmoe.engines.base import Batch
from pltmoe.train.callbacks.base import Callback

if TYPE_CHECKING:
    from pltmoe.train.trainer import StepReport, Trainer

logger = logging.getLogger(__name__)


class Validation(Callback):
    """Computes ``valid/loss`` every ``train.eval_interval`` steps and after the last one."""

    def __init__(self, batches: Callable[[], Iterator[Batch]]):
        """Take a function that starts over at the first validation sequence."""
        self._batches = batches

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        """Validate when it is time."""
        train = trainer.config.train
        if train.eval_interval is None:
            return
        if report.step % train.eval_interval and report.step != train.steps:
            return
        batches, total, tokens = self._batches(), 0.0, 0
        for number in range(train.eval_steps):
            trainer.heartbeat.mark(
                f"validation batch {number + 1} after step {report.step}", slack=number == 0
            )
            loss_sum, count = trainer.engine.eval_step(batches)
            total, tokens = total + loss_sum, tokens + count
        loss = total / max(tokens, 1)
        report.metrics["valid/loss"] = loss
        perplexity = math.exp(min(loss, 700.0))
        logger.info("step %d  valid loss %.4f  perplexity %.2f", report.step, loss, perplexity)
