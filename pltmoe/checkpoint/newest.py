"""Which checkpoint a run goes on from: the newest that is what was written."""

import logging
import os
from pathlib import Path

from pltmoe.checkpoint import folders
from pltmoe.checkpoint.integrity import check_files_together
from pltmoe.checkpoint.manifest import Manifest, read_manifest
from pltmoe.errors import CheckpointError, DamagedCheckpointError
from pltmoe.runtime.distributed import on_main

logger = logging.getLogger(__name__)

DAMAGED, LEFT = "damaged_", "left_"


def newest_intact(run_dir: Path, verify: bool) -> tuple[Path, Manifest] | None:
    """Return the checkpoint that ``latest`` names and its manifest, or None; all ranks call it.

    Where it is damaged, the one before is taken, ``latest`` names that one, and the damaged folder
    is renamed ``damaged_step_...``: kept for whoever looks into it, not counted any more.

    Args:
        run_dir: ``train.output_dir``.
        verify: compare all files with their checksums, not their sizes only.

    Raises:
        CheckpointError: all are damaged, or a manifest is of a newer format.
    """
    damaged: dict[Path, str] = {}
    for folder in on_main(lambda: folders.resumable_checkpoints(run_dir)):
        try:
            manifest = on_main(lambda folder=folder: read_manifest(folder))
            if verify:
                check_files_together(folder, manifest)
        except DamagedCheckpointError as error:
            damaged[folder] = str(error)
            continue
        if damaged:
            on_main(lambda folder=folder: _fall_back(damaged, folder))
        return folder, manifest
    if damaged:
        raise CheckpointError(
            f"{run_dir / 'checkpoints'}: no checkpoint is intact ({'; '.join(damaged.values())}): "
            "put back a copy of one, or choose another train.output_dir to start anew"
        )
    return None


def _fall_back(damaged: dict[Path, str], folder: Path) -> None:
    for why in damaged.values():
        logger.warning("%s", why)
    logger.warning("going on from %s, the newest checkpoint that is intact", folder)
    try:
        folders.point_to(folder)
        for bad in damaged:
            os.rename(bad, _free_name(bad, DAMAGED))
    except OSError as error:
        logger.warning("%s: %s; damaged checkpoints stay where they are", folder, error.strerror)


def leave_later(folder: Path) -> None:
    """Rename checkpoints later than ``folder``, from which a run goes on; rank 0 calls it.

    Somebody has gone back and left that branch. It is kept, but must not be counted among what is
    saved from here on, at other steps perhaps, nor be fallen back to.
    """
    every = folders.complete_checkpoints(folder.parent)
    for later in every[every.index(folder) + 1 :]:
        name = _free_name(later, LEFT)
        logger.warning("going on from %s; the later %s is now %s", folder, later.name, name.name)
        try:
            os.rename(later, name)
        except OSError as error:
            raise CheckpointError(f"{later} cannot be renamed: {error.strerror}") from error


def _free_name(folder: Path, prefix: str) -> Path:
    name, number = folder.with_name(prefix + folder.name), 1
    while name.exists():
        number += 1
        name = folder.with_name(f"{prefix}{folder.name}_{number}")
    return name
