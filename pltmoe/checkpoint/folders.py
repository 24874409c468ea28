"""Checkpoint folders on disk: their names, which is the newest, which are deleted.

    OUTPUT_DIR/checkpoints/
        step_00000100/        Megatron torch_dist files, the tokenizer, manifest.json (last)
        .writing_step_...     being written, or left by a crash: never read, cleaned at start
        damaged_step_...      was found to be damaged (newest.py): kept, never read
        left_step_...         of a run that went back to an earlier step (newest.py): the same
        latest                name of the newest folder, replaced atomically before the rename

Needs neither torch nor Megatron.
"""

import logging
import os
import re
import shutil
from pathlib import Path

from pltmoe.checkpoint.manifest import MANIFEST
from pltmoe.runtime.files import flush_to_disk

logger = logging.getLogger(__name__)

LATEST = "latest"
WRITING, OLD = ".writing_", ".old_"
_STEP_FOLDER = re.compile(r"step_(\d{8,})")


def step_folder(step: int) -> str:
    """Return the folder name of a step, e.g. ``step_00000100``."""
    return f"step_{step:08d}"


def latest_checkpoint(run_dir: Path) -> Path | None:
    """Return the newest complete checkpoint of a run, or None.

    ``run_dir`` is ``train.output_dir``. When ``latest`` names a folder that is not there (someone
    deleted a bad checkpoint, or a save ended before the rename), the newest complete folder is
    taken instead.
    """
    directory = run_dir / "checkpoints"
    pointer = directory / LATEST
    if pointer.is_file():
        named = directory / pointer.read_text(encoding="utf-8", errors="replace").strip()
        if _STEP_FOLDER.fullmatch(named.name) and (named / MANIFEST).is_file():
            return named
        logger.warning("%s names %s, which is not there: looking for another", pointer, named.name)
    complete = complete_checkpoints(directory)
    return complete[-1] if complete else None


def resumable_checkpoints(run_dir: Path) -> list[Path]:
    """Return the newest complete checkpoint of a run, then those before it, newest first."""
    newest = latest_checkpoint(run_dir)
    if newest is None:
        return []
    older = [p for p in complete_checkpoints(newest.parent) if _step_of(p) < _step_of(newest)]
    return [newest, *reversed(older)]


def complete_checkpoints(directory: Path) -> list[Path]:
    """Return the complete checkpoint folders in ``directory``, oldest step first."""
    if not directory.is_dir():
        return []
    found = [
        path
        for path in directory.iterdir()
        if _STEP_FOLDER.fullmatch(path.name) and (path / MANIFEST).is_file()
    ]
    return sorted(found, key=_step_of)


def prune(directory: Path, keep_last: int, keep_every: int | None) -> list[Path]:
    """Delete checkpoints that are neither among the newest nor at a kept step; rank 0 calls it.

    The folder that ``latest`` names is always kept, and later ones do not count (newest.py renames
    those of a branch that was left). Returns what was deleted.
    """
    newest = latest_checkpoint(directory.parent)
    if newest is None:
        return []
    counted = [p for p in complete_checkpoints(directory) if _step_of(p) <= _step_of(newest)]
    doomed = [
        path
        for path in counted[: max(0, len(counted) - keep_last)]
        if not (keep_every and _step_of(path) % keep_every == 0)
    ]
    for path in doomed:
        _remove(path)
    return doomed


def clean_unfinished(directory: Path) -> list[Path]:
    """Delete folders that a crash left half-written or half-deleted; rank 0 calls it."""
    if not directory.is_dir():
        return []
    leftovers = [p for p in directory.iterdir() if p.name.startswith((WRITING, OLD))]
    for path in leftovers:
        logger.warning("deleting %s, left unfinished by an earlier run", path)
        shutil.rmtree(path)
    return leftovers


def point_to(folder: Path) -> None:
    """Let ``latest`` beside ``folder`` name it, from one moment to the next."""
    part = folder.with_name(f".{LATEST}.part")
    part.write_text(folder.name + "\n", encoding="utf-8")
    flush_to_disk(part)
    os.replace(part, folder.with_name(LATEST))
    flush_to_disk(folder.parent)


def _remove(path: Path) -> None:
    """Delete a folder so that a crash in between cannot leave something that looks complete."""
    doomed = path.with_name(OLD + path.name)
    os.rename(path, doomed)
    shutil.rmtree(doomed)


def _step_of(path: Path) -> int:
    found = _STEP_FOLDER.fullmatch(path.name)
    assert found
    return int(found[1])
