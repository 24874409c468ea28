"""Checkpoints written and read: Megatron's sharded state dicts in a folder of their own.

``state`` is a Megatron sharded state dict: tensors are named and placed by what they are, not by
the rank that holds them, so a checkpoint loads under another layout.
"""

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.validation import StrictHandling
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorProperties

from pltmoe.checkpoint.folders import step_folder
from pltmoe.checkpoint.manifest import Manifest
from pltmoe.checkpoint.saving import Save, reason
from pltmoe.errors import CheckpointError

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


def begin_save(
    directory: Path,
    state: dict[str, Any],
    manifest: Manifest,
    tokenizer: Mapping[str, bytes] | None = None,
    *,
    background: bool = False,
) -> Save:
    """Begin to write ``state`` as ``directory/step_...``; all ranks call it, and later ``finish``.

    Args:
        directory: the run's ``checkpoints`` folder.
        state: sharded state dict of this rank.
        manifest: what to say about it; sizes, checksums and the tokenizer's hash are filled in.
        tokenizer: what ``read_tokenizer`` returns, on rank 0; written into the folder.
        background: write while the caller goes on and changes the state.

    Raises:
        CheckpointError: it cannot be written (disk full, no permission). Older ones are untouched.
    """
    final = directory / step_folder(manifest.step)
    return Save(final, state, manifest, tokenizer, background=background)


def write_folder(
    final: Path,
    state: dict[str, Any],
    manifest: Manifest,
    tokenizer: Mapping[str, bytes] | None = None,
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


def check_torch() -> None:
    """Refuse a PyTorch with which Megatron-core writes checkpoints that it cannot read.

    It makes a tensor of each one's properties; 0.19.2 with PyTorch 2.15: they have ``strides``.

    Raises:
        CheckpointError: this is one.
    """
    try:
        torch.empty(1, **vars(TensorProperties()), device="meta")
    except TypeError as error:
        raise CheckpointError(
            f"torch {torch.__version__} is too new: Megatron-core could not read the checkpoints "
            f"it writes with it ({error}); pip install 'torch<2.15'"
        ) from error
