"""Which checkpoint a path stands for, where a user names one."""

from pathlib import Path

from pltmoe.checkpoint.folders import latest_checkpoint
from pltmoe.checkpoint.manifest import MANIFEST
from pltmoe.errors import CheckpointError


def find_checkpoint(path: Path) -> Path:
    """Return ``path`` if it is a checkpoint folder, else the latest one in it.

    Raises:
        CheckpointError: neither a checkpoint nor a run with one.
    """
    if (path / MANIFEST).is_file():
        return path
    for run in (path, path.parent if path.name == "checkpoints" else path):
        if (newest := latest_checkpoint(run)) is not None:
            return newest
    raise CheckpointError(
        f"{path}: neither a checkpoint folder (with {MANIFEST}) nor a run with "
        "checkpoints/latest; name a folder such as OUTPUT_DIR/checkpoints/step_00000100"
    )
