"""Checkpoint folders without tensors."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pltmoe.checkpoint.manifest import Manifest, write_manifest
from tests.distributed.tiny import tiny_config


@pytest.fixture
def fake_checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """``fake_checkpoint(step)`` writes a complete folder in which the tensors are a text file."""

    def make(step: int, **fields: Any) -> Path:
        folder = tmp_path / "checkpoints" / f"step_{step:08d}"
        folder.mkdir(parents=True)
        (folder / "__0_0.distcp").write_text("tensors")
        write_manifest(folder, Manifest(config=tiny_config(), step=step, **fields))
        return folder

    return make
