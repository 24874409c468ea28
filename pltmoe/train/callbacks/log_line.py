"""One line a logged step, and the numbers in it as metrics."""

from __future__ import annotations

import logging
from datetime import timedelta
from typing import TYPE_CHECKING

from pltmoe.runtime.devices import peak_memory_gib
from pltmoe.runtime.distributed import highest
from pltmoe.train.callbacks.base import Callback
from pltmoe.train.throughput import Throughput

if TYPE_CHECKING:
    from pltmoe.train.trainer import StepReport, Trainer

logger = logging.getLogger(__name__)


class LogLine(Callback):
    """Adds loss, learning rate, throughput and memory of a logged step to its metrics."""

    def __init__(self, throughput: Throughput):
        self._throughput = throughput

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        """Count the step's time; on a logged step, fill the metrics and write the line."""
        self._throughput.add(report.seconds)
        if report.result.skipped:  # tracked at its own step, whatever the interval
            report.metrics.update(_of_the_step(report))
        if not trainer.is_logged(report.step):
            return
        report.metrics.update(
            {
                **_of_the_step(report),
                "train/tokens": float(trainer.consumed.tokens_after(report.step)),
                "optim/lr": report.result.learning_rate,
                "memory/peak_gib": highest(peak_memory_gib()),
                **self._throughput.take(),
                **report.result.model_metrics,
            }
        )
        logger.info("%s", describe(report.step, trainer.config.train.steps, report.metrics))


def _of_the_step(report: StepReport) -> dict[str, float]:
    return {
        "train/loss": report.result.loss,
        "train/skipped_steps": float(report.result.skipped_steps),
        "optim/grad_norm": report.result.grad_norm,
    }


def describe(step: int, steps: int, metrics: dict[str, float]) -> str:
    """Return the line of one step.

    ``step 20/500  loss 5.1234  lr 3.0e-04  grad 0.81  12,345 tokens/s  0.123 TFLOP/s/GPU  …``
    """
    left = timedelta(seconds=round((steps - step) * metrics["perf/seconds_per_step"]))
    parts = [
        f"step {step}/{steps}",
        f"loss {metrics['train/loss']:.4f}",
        f"lr {metrics['optim/lr']:.2e}",
        f"grad {metrics['optim/grad_norm']:.3g}",
        f"{metrics['perf/tokens_per_second']:,.0f} tokens/s",
        f"{metrics['perf/tflops_per_gpu']:.3g} TFLOP/s per device",
        f"mem {metrics['memory/peak_gib']:.2f} GiB",
        f"ETA {left}",
    ]
    if "perf/mfu" in metrics:
        parts.insert(6, f"MFU {metrics['perf/mfu']:.1%}")
    if skipped := metrics.get("train/skipped_steps"):
        parts.insert(4, f"skipped {skipped:.0f}")
    return "  ".join(parts)
