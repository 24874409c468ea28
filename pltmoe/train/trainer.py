"""The training loop. It knows steps, data order and time; the engine knows everything else.

    for each step:   engine.train_step(this rank's share of the global batch)
                     callbacks in order: validation, log line, tracking, checkpoint
                     stop here if any process was asked to
    meanwhile:       a watcher that ends all ranks when one hangs (runtime/heartbeat.py)

Steps count from 1. The order of the data is a function of the number of sequences consumed; so a
run is resumed by that number and its step.
"""

import enum
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from pltmoe.config import RunConfig
from pltmoe.engines.base import Batch, Engine, StepResult
from pltmoe.runtime.distributed import highest
from pltmoe.runtime.heartbeat import Heartbeat
from pltmoe.runtime.signals import StopRequest
from pltmoe.train.callbacks.base import Callback
from pltmoe.train.consumed import Consumed


class Outcome(enum.Enum):
    """How training ended, if it did not raise."""

    FINISHED = "all steps are done"
    STOPPED = "a signal asked to stop"


@dataclass
class StepReport:
    """One finished step, as callbacks see it."""

    step: int
    result: StepResult
    seconds: float
    """Wall time of the step, with the wait for data."""
    metrics: dict[str, float] = field(default_factory=dict)
    """What will be tracked; callbacks fill it."""


class Trainer:
    """Takes the steps of one run from ``step`` to ``train.steps``."""

    def __init__(
        self,
        config: RunConfig,
        engine: Engine,
        batches_from: Callable[[int], Iterator[Batch]],
        callbacks: Sequence[Callback],
        stop: StopRequest,
        consumed: Consumed,
    ):
        """Prepare.

        Args:
            config: the run.
            engine: at ``consumed.step`` already.
            batches_from: this rank's micro batches after so many consumed sequences (all ranks').
            callbacks: called in this order after every step.
            stop: set by signals.
            consumed: where the run begins or goes on.
        """
        self.config, self.engine, self.consumed = config, engine, consumed
        self.step = consumed.step
        self._batches_from, self._callbacks, self._stop = batches_from, callbacks, stop
        self.stop_signal = 0
        minutes = config.train.hang_timeout_minutes
        timeout_s = None if minutes is None else minutes * 60
        self.heartbeat = Heartbeat(timeout_s, config.train.output_dir / "logs")

    def fit(self) -> Outcome:
        """Train until the last step, or until a signal; saves through the callbacks.

        Raises:
            EngineError: a step failed; nothing is saved.
        """
        with self.heartbeat, _short_garbage_collections():
            return self._fit()

    def _fit(self) -> Outcome:
        train = self.config.train
        batches = self._batches_from(self.consumed.sequences_after(self.step))
        batches = self._marked(batches, self.step)
        self.stop_signal = int(highest(self._stop.signal))  # asked during the start
        while self.step < train.steps and not self.stop_signal:
            self._take_step(batches)
            self.heartbeat.mark(f"agreement after step {self.step}", slack=True)
            self.stop_signal = int(highest(self._stop.signal))
        for callback in self._callbacks:
            self.heartbeat.mark(f"{type(callback).__name__} after the last step", slack=True)
            callback.after_last_step(self)
        return Outcome.FINISHED if self.step >= train.steps else Outcome.STOPPED

    def is_logged(self, step: int) -> bool:
        """Whether a step gets a line: the first, the last, and every ``log_interval``-th."""
        train = self.config.train
        return step in (1, train.steps) or step % train.log_interval == 0

    def _take_step(self, batches: Iterator[Batch]) -> None:
        begin, number = time.perf_counter(), self.step + 1
        result = self.engine.train_step(batches, number, watch=self.is_logged(number))
        self.step = number
        report = StepReport(number, result, time.perf_counter() - begin)
        for callback in self._callbacks:
            self.heartbeat.mark(f"{type(callback).__name__} after step {number}", slack=True)
            callback.after_step(self, report)

    def _marked(self, batches: Iterator[Batch], start: int) -> Iterator[Batch]:
        """Tell the heartbeat what a step waits for; the first one builds, compiles and connects."""
        while True:
            number = self.step + 1
            first = number == start + 1
            self.heartbeat.mark(f"data of step {number}", slack=first)
            if (batch := next(batches, None)) is None:
                return
            self.heartbeat.mark(f"forward and backward of step {number}", slack=first)
            yield batch


@contextmanager
def _short_garbage_collections() -> Iterator[None]:
    """Keep what start-up made (0.3 million objects) out of Python's garbage collections.

    A full one takes 0.1 s otherwise, on each rank at a step of its own, while all others wait.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
