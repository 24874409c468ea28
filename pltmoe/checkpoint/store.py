"""Checkpoint folders on disk: written beside, renamed when whole, pruned when a newer one is safe.

    OUTPUT_DIR/checkpoints/
        step_00000100/        Megatron torch_dist files, tokenizer.model, manifest.json (last)
        .writing_step_...     being written, or left by a crash: never read, cleaned at start
        damaged_step_...      was found to be damaged (newest.py): kept, never read
        latest                name of the newest folder, replaced atomically after the rename

``state`` is a Megatron sharded state dict: tensors are named and placed by what they are, not by
the rank that holds them, so a checkpoint loads under another layout.
"""

import logging
import os
import pickle
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.validation import StrictHandling
from torch.distributed.checkpoint.api import CheckpointException

from pltmoe.checkpoint.manifest import MANIFEST, Manifest
from pltmoe.checkpoint.saving import LATEST, OLD, WRITING, Save, reason
from pltmoe.errors import CheckpointError

logger = logging.getLogger(__name__)

_STEP_FOLDER = re.compile(r"step_(\d{8,})")
_UNREADABLE = (
    CheckpointingException,
    CheckpointException,
    RuntimeError,
    OSError,
    EOFError,
    KeyError,
    ValueError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
)
"""What PyTorch and Megatron raise on damaged or missing tensors."""


def step_folder(step: int) -> str:
    """Return the folder name of a step, e.g. ``step_00000100``."""
    return f"step_{step:08d}"


def begin_save(
    directory: Path,
    state: dict[str, Any],
    manifest: Manifest,
    tokenizer: Path | None = None,
    *,
    background: bool,
) -> Save:
    """Begin to write ``state`` as ``directory/step_...``; all ranks call it, and later ``finish``.

    Args:
        directory: the run's ``checkpoints`` folder.
        state: sharded state dict of this rank.
        manifest: what to say about it; sizes, checksums and the tokenizer's hash are filled in.
        tokenizer: sentencepiece model that is copied into the folder.
        background: write while the caller goes on and changes the state.

    Raises:
        CheckpointError: it cannot be written (disk full, no permission). Older ones are untouched.
    """
    final = directory / step_folder(manifest.step)
    return Save(final, state, manifest, tokenizer, background=background)


def save_checkpoint(
    directory: Path, state: dict[str, Any], manifest: Manifest, tokenizer: Path | None = None
) -> Path:
    """Write ``state`` as ``directory/step_...`` and point ``latest`` to it; all ranks call it.

    Returns the finished folder; see ``begin_save``.

    Raises:
        CheckpointError: it cannot be written.
    """
    return begin_save(directory, state, manifest, tokenizer, background=False).finish()


def write_folder(
    final: Path, state: dict[str, Any], manifest: Manifest, tokenizer: Path | None = None
) -> None:
    """Write one checkpoint folder of any name, whole or not at all; all ranks call it.

    Raises:
        CheckpointError: it cannot be written.
    """
    Save(final, state, manifest, tokenizer, point=False).finish()


def load_state(directory: Path, state: dict[str, Any]) -> dict[str, Any]:
    """Fill the placeholders in ``state`` from a checkpoint folder; all ranks call it.

    Raises:
        CheckpointError: a tensor is missing, has another shape, or its file is damaged.
    """
    try:
        return dist_checkpointing.load(
            state, str(directory), strict=StrictHandling.RAISE_UNEXPECTED
        )
    except _UNREADABLE as error:
        raise CheckpointError(f"{directory}: cannot be loaded: {reason(error)}") from error


def latest_checkpoint(run_dir: Path) -> Path | None:
    """Return the newest complete checkpoint of a run, or None.

    ``run_dir`` is ``train.output_dir``. When ``latest`` names a folder that is gone (someone
    deleted a bad checkpoint), the newest complete folder is taken instead.
    """
    directory = run_dir / "checkpoints"
    pointer = directory / LATEST
    if pointer.is_file():
        named = directory / pointer.read_text().strip()
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

    The folder that ``latest`` names is always kept. Returns what was deleted.
    """
    complete = complete_checkpoints(directory)
    pointer = directory / LATEST
    named = pointer.read_text().strip() if pointer.is_file() else None
    doomed = [
        path
        for path in complete[: max(0, len(complete) - keep_last)]
        if path.name != named and not (keep_every and _step_of(path) % keep_every == 0)
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


def _remove(path: Path) -> None:
    """Delete a folder so that a crash in between cannot leave something that looks complete."""
    doomed = path.with_name(OLD + path.name)
    os.rename(path, doomed)
    shutil.rmtree(doomed)


def _step_of(path: Path) -> int:
    found = _STEP_FOLDER.fullmatch(path.name)
    assert found
    return int(found[1])
