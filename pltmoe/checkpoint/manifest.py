"""What a checkpoint says about itself: ``manifest.json``, written last: where it is, all is.

A checkpoint can be used from its folder alone: the manifest holds the complete configuration, and
the tokenizer lies next to it.
"""

import hashlib
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pltmoe.config import RunConfig, config_from_dict, config_to_dict
from pltmoe.errors import CheckpointError, ConfigError, DamagedCheckpointError
from pltmoe.runtime.versions import commit, versions

MANIFEST = "manifest.json"
_OWN_HASH = "manifest_sha256"


class Manifest(BaseModel):
    """The description of one checkpoint."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True, extra="ignore")

    format: int = 1
    """Raised when older code could no longer read the folder."""
    config: RunConfig
    """The complete configuration of the run."""
    step: int = 0
    """Optimizer steps taken."""
    tokens: int = 0
    """Tokens consumed: steps x sequences x slots."""
    consumed_samples: int = 0
    """Training sequences consumed, over all ranks: where the data order goes on."""
    train_samples: int = 0
    """Length of the training order that was drawn; another length is another order."""
    world_size: int = 1
    """Processes that wrote it."""
    precision: str = "fp32"
    """Precision of the weights (what ``train.precision: auto`` meant on that machine)."""
    contains: tuple[str, ...] = ("model", "optimizer", "random", "guard")
    """Parts of ``Engine.state`` in it; converted checkpoints have the model only."""
    tokenizer_sha256: str | None = None
    """Hash of the tokenizer's main file, tokenizer.model or tokenizer.json."""
    versions: dict[str, str] = Field(default_factory=versions)
    """Python and packages."""
    commit: str = Field(default_factory=commit)
    """Commit of pltmoe, or unknown."""
    created: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    """UTC time of writing."""
    data: dict[str, str] = {}
    """Fingerprint of each training source (data/fingerprint.py), by its path."""
    files: dict[str, int] = {}
    """Name and size in bytes of every other file in the folder."""
    checksums: dict[str, str] = {}
    """Checksums of these files; checkpoints from before there were any have none."""


def write_manifest(directory: Path, manifest: Manifest) -> Path:
    """Write ``manifest.json`` with the sizes of all files now in ``directory``, and its own hash.

    ``manifest.checksums`` are the caller's: files are not read again.
    """
    sizes = {
        path.relative_to(directory).as_posix(): path.stat().st_size
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    manifest = manifest.model_copy(update={"files": sizes})
    tree = manifest.model_dump(mode="json", exclude={"config"})
    tree["config"] = config_to_dict(manifest.config)
    tree[_OWN_HASH] = _own_hash(tree)
    path = directory / MANIFEST
    path.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
    return path


def read_manifest(directory: Path | str) -> Manifest:
    """Read the manifest of a checkpoint folder and check that the folder is whole.

    Raises:
        CheckpointError: no such folder, no manifest, or one of a newer format.
        DamagedCheckpointError: the manifest is not what was written, or a file is missing or has
            another size than when it was written.
    """
    directory = Path(directory)
    tree = _read_json(directory)
    written = tree.pop(_OWN_HASH, None)
    if written is not None and written != _own_hash(tree):
        raise DamagedCheckpointError(
            f"{directory / MANIFEST}: has changed since it was written (its own hash differs); "
            f"if you edited it, delete the line {_OWN_HASH} in it"
        )
    if tree.get("format", 1) > 1:
        raise CheckpointError(
            f"{directory / MANIFEST}: format {tree['format']} is newer than this pltmoe reads (1): "
            "use the version that wrote it"
        )
    try:
        config = config_from_dict(tree.pop("config", {}), where=f"{directory / MANIFEST}: config")
        manifest = Manifest(config=config, **tree)
    except (ConfigError, ValidationError, TypeError) as error:
        raise CheckpointError(f"{directory / MANIFEST}: {' '.join(str(error).split())}") from None
    _check_files(directory, manifest.files)
    return manifest


def _read_json(directory: Path) -> dict[str, Any]:
    path = directory / MANIFEST
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such checkpoint folder")
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{directory}: no {MANIFEST}, so it is no checkpoint or was never completed; name a "
            "folder such as OUTPUT_DIR/checkpoints/step_00000100"
        ) from None
    except (OSError, ValueError) as error:
        raise DamagedCheckpointError(f"{path}: cannot be read ({error})") from None
    if not isinstance(tree, dict):
        raise DamagedCheckpointError(f"{path}: expected a JSON object")
    return tree


def _own_hash(tree: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def _check_files(directory: Path, sizes: dict[str, int]) -> None:
    for name, size in sizes.items():
        path = directory / name
        if not path.is_file():
            raise DamagedCheckpointError(
                f"{directory}: {name} is missing, the checkpoint is damaged"
            )
        if path.stat().st_size != size:
            raise DamagedCheckpointError(
                f"{path}: {path.stat().st_size} bytes, but {size} were written: the checkpoint is "
                "damaged"
            )
