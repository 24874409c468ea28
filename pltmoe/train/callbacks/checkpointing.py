"""Saves at intervals, at the end and when asked to stop; then deletes what is no longer kept.

With ``checkpoint.asynchronous`` a save is begun after one step and completed after a later one, the
first at which every rank has written its files. One is under way at a time. What it cost is logged
when it is whole, in a line of its own, at the step that was then the last.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pltmoe.checkpoint import folders, store
from pltmoe.checkpoint.manifest import Manifest
from pltmoe.checkpoint.saving import Save
from pltmoe.config.run import CheckpointConfig
from pltmoe.runtime.distributed import on_main
from pltmoe.train.callbacks.base import Callback

if TYPE_CHECKING:
    from pltmoe.train.trainer import StepReport, Trainer

logger = logging.getLogger(__name__)

Log = Callable[[int, dict[str, float]], None]


class Checkpointing(Callback):
    """Writes ``output_dir/checkpoints/step_...`` according to the checkpoint section."""

    def __init__(
        self,
        describe: Callable[[int], Manifest],
        saved_step: int | None,
        log: Log | None = None,
        tokenizer: Mapping[str, bytes] | None = None,
    ):
        """Prepare.

        Args:
            describe: returns the manifest of a step.
            saved_step: the step that is on disk already, of a resumed run.
            log: takes a step and metrics; None on ranks that track nothing.
            tokenizer: its files as they were when the run began, on rank 0: what becomes of
                ``data.tokenizer`` meanwhile neither ends a save nor comes into a checkpoint.
        """
        self._describe, self._saved_step, self._log = describe, saved_step, log
        self._tokenizer = tokenizer
        self._under_way: _UnderWay | None = None

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        """Complete what has been written meanwhile; save when it is time."""
        if self._under_way is not None and self._under_way.is_written():
            self._complete(report.step)
        interval = trainer.config.checkpoint.save_interval
        if interval is not None and report.step % interval == 0:
            self._begin(trainer)

    def after_last_step(self, trainer: Trainer) -> None:
        """Save what is not saved yet, and wait until it is whole."""
        self._begin(trainer)
        self.complete(trainer.step)

    def complete(self, step: int) -> None:
        """Wait for a save that is under way, if there is one; all ranks call it.

        Raises:
            CheckpointError: it could not be written.
        """
        if self._under_way is not None:
            self._complete(step)

    def abandon(self) -> None:
        """Give a save up that is under way; for a rank that cannot ask the others any more."""
        if self._under_way is not None:
            self._under_way.save.abandon()
            self._under_way = None

    def _begin(self, trainer: Trainer) -> None:
        if trainer.step == self._saved_step:
            return
        if self._under_way is not None:
            logger.info(
                "step %d is to be saved, but step %d is still being written: training waits for "
                "it (a longer checkpoint.save_interval, or a faster disk, would help)",
                trainer.step, self._saved_step,
            )  # fmt: skip
            self._complete(trainer.step)
        config, begin = trainer.config, time.perf_counter()
        state = trainer.engine.state()
        save = store.begin_save(
            config.train.output_dir / "checkpoints",
            state,
            self._describe(trainer.step).model_copy(update={"contains": tuple(state)}),
            self._tokenizer,
            background=config.checkpoint.asynchronous,
        )
        self._saved_step = trainer.step
        self._under_way = _UnderWay(save, begin, config.checkpoint)
        if not config.checkpoint.asynchronous:
            self._complete(trainer.step)

    def _complete(self, step: int) -> None:
        assert self._under_way is not None
        done, self._under_way = self._under_way, None
        metrics = done.complete()
        if self._log is not None:
            self._log(step, metrics)


class _UnderWay:
    """A save and the time it takes."""

    def __init__(self, save: Save, begin: float, keep: CheckpointConfig):
        """Take a save that began at ``begin`` (of time.perf_counter)."""
        self.save, self._begin, self._keep = save, begin, keep
        self._stall = time.perf_counter() - begin

    def is_written(self) -> bool:
        """Whether all ranks have written their files."""
        begin = time.perf_counter()
        written = self.save.is_written()
        self._stall += time.perf_counter() - begin
        return written

    def complete(self) -> dict[str, float]:
        """Make the checkpoint whole, delete old ones; return what it cost."""
        begin = time.perf_counter()
        folder = self.save.finish()
        now = time.perf_counter()
        self._prune(folder.parent)
        self._stall += time.perf_counter() - begin
        logger.info(
            "saved %s in %.1f s, training stood still for %.1f s",
            folder, now - self._begin, self._stall,
        )  # fmt: skip
        return {
            "checkpoint/save_seconds": now - self._begin,
            "checkpoint/stall_seconds": self._stall,
        }

    def _prune(self, directory: Path) -> None:
        def prune() -> None:
            try:
                folders.prune(directory, self._keep.keep_last, self._keep.keep_every)
            except OSError as error:  # the new one is whole; no reason to end the run
                logger.warning("%s: an old checkpoint cannot be deleted: %s", directory, error)

        on_main(prune)
