"""Saves at intervals, at the end and when asked to stop; then deletes what is no longer kept."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from pltmoe.checkpoint import store
from pltmoe.checkpoint.manifest import Manifest
from pltmoe.runtime.distributed import on_main
from pltmoe.train.callbacks.base import Callback

if TYPE_CHECKING:
    from pltmoe.train.trainer import StepReport, Trainer

logger = logging.getLogger(__name__)


class Checkpointing(Callback):
    """Writes ``output_dir/checkpoints/step_...`` according to the checkpoint section."""

    def __init__(self, describe: Callable[[int], Manifest], saved_step: int | None):
        """Prepare.

        Args:
            describe: returns the manifest of a step.
            saved_step: the step that is on disk already, of a resumed run.
        """
        self._describe, self._saved_step = describe, saved_step

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        """Save when it is time."""
        interval = trainer.config.checkpoint.save_interval
        if interval is not None and report.step % interval == 0:
            self._save(trainer)

    def after_last_step(self, trainer: Trainer) -> None:
        """Save what is not saved yet."""
        self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        if trainer.step == self._saved_step:
            return
        config, begin = trainer.config, time.perf_counter()
        directory = config.train.output_dir / "checkpoints"
        manifest = self._describe(trainer.step)
        state = trainer.engine.state()
        folder = store.save_checkpoint(directory, state, manifest, config.data.tokenizer)
        self._saved_step = trainer.step
        keep = config.checkpoint
        on_main(lambda: store.prune(directory, keep.keep_last, keep.keep_every))
        logger.info("saved %s in %.1f s", folder, time.perf_counter() - begin)
