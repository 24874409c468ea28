"""Checkpoint folders on disk: written beside, renamed when whole, pruned when a newer one is safe.

    OUTPUT_DIR/checkpoints/
        step_00000100/        Megatron torch_dist files, tokenizer.model, manifest.json (last)
        .writing_step_...     being written, or left by a crash: never read, cleaned at start
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

from pltmoe.checkpoint.in_process import save_in_process
from pltmoe.checkpoint.manifest import MANIFEST, TOKENIZER, Manifest, file_hash, write_manifest
from pltmoe.errors import CheckpointError
from pltmoe.runtime.distributed import on_main

logger = logging.getLogger(__name__)

LATEST = "latest"
_WRITING, _OLD = ".writing_", ".old_"
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


def save_checkpoint(
    directory: Path, state: dict[str, Any], manifest: Manifest, tokenizer: Path | None = None
) -> Path:
    """Write ``state`` as ``directory/step_...`` and point ``latest`` to it; all ranks call it.

    Args:
        directory: the run's ``checkpoints`` folder.
        state: sharded state dict of this rank.
        manifest: what to say about it; file sizes and the tokenizer's hash are filled in.
        tokenizer: sentencepiece model that is copied into the folder.

    Returns:
        The finished folder.

    Raises:
        CheckpointError: it cannot be written (disk full, no permission). Older ones are untouched.
    """
    final = directory / step_folder(manifest.step)
    write_folder(final, state, manifest, tokenizer)
    on_main(lambda: _explain(directory, lambda: _point_to(final)))
    return final


def write_folder(
    final: Path, state: dict[str, Any], manifest: Manifest, tokenizer: Path | None = None
) -> None:
    """Write one checkpoint folder of any name, whole or not at all; all ranks call it.

    Raises:
        CheckpointError: it cannot be written.
    """
    writing = final.with_name(_WRITING + final.name)
    on_main(lambda: _explain(writing, lambda: _fresh_folder(writing)))
    save_in_process()
    try:
        dist_checkpointing.save(state, str(writing), validate_access_integrity=True)
    except (CheckpointException, CheckpointingException, OSError, RuntimeError) as error:
        raise CheckpointError(f"{writing}: cannot be written ({_first_line(error)})") from error
    on_main(lambda: _explain(final, lambda: _complete(writing, final, manifest, tokenizer)))


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
        raise CheckpointError(f"{directory}: cannot be loaded: {_first_line(error)}") from error


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
    leftovers = [p for p in directory.iterdir() if p.name.startswith((_WRITING, _OLD))]
    for path in leftovers:
        logger.warning("deleting %s, left unfinished by an earlier run", path)
        shutil.rmtree(path)
    return leftovers


def _fresh_folder(writing: Path) -> None:
    if writing.exists():
        shutil.rmtree(writing)
    writing.mkdir(parents=True)


def _complete(writing: Path, final: Path, manifest: Manifest, tokenizer: Path | None) -> None:
    if tokenizer is not None:
        shutil.copyfile(tokenizer, writing / TOKENIZER)
        manifest = manifest.model_copy(update={"tokenizer_sha256": file_hash(tokenizer)})
    write_manifest(writing, manifest)
    for path in writing.rglob("*"):
        if path.is_file():
            _sync(path)
    _sync(writing)
    if final.exists():  # the same step again, after a resume from an older one
        os.rename(final, final.with_name(_OLD + final.name))
    os.rename(writing, final)
    _sync(final.parent)
    shutil.rmtree(final.with_name(_OLD + final.name), ignore_errors=True)


def _point_to(final: Path) -> None:
    part = final.with_name(f".{LATEST}.part")
    part.write_text(final.name + "\n")
    _sync(part)
    os.replace(part, final.with_name(LATEST))
    _sync(final.parent)


def _remove(path: Path) -> None:
    """Delete a folder so that a crash in between cannot leave something that looks complete."""
    doomed = path.with_name(_OLD + path.name)
    os.rename(path, doomed)
    shutil.rmtree(doomed)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _explain(path: Path, action: Any) -> None:
    try:
        action()
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be written ({error.strerror or error}); older checkpoints are "
            "untouched"
        ) from error


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _step_of(path: Path) -> int:
    found = _STEP_FOLDER.fullmatch(path.name)
    assert found
    return int(found[1])
