"""``PREFIX.manifest.json``: what a preprocessed dataset was made from, counts and hashes."""

import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from pltmoe.errors import DataError

FORMAT = 1


class _Record(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class HashedFile(_Record):
    """A file with its size and contents."""

    path: str
    bytes: int
    sha256: str


class TokenizerRecord(_Record):
    """The tokenizer that wrote the ids."""

    path: str
    sha256: str
    vocab_size: int
    end_of_document_id: int


class DatasetManifest(_Record):
    """Everything that decides a dataset's bytes, and what came out. Holds no time or host, so that
    the same inputs give the same manifest."""

    format: int = FORMAT
    documents: int
    """Documents written; each ends with the end-of-document id."""
    empty_documents: int
    """Documents without text, left out."""
    tokens: int
    """Token ids written, end-of-document ids included."""
    text_bytes: int
    """Bytes of the text in UTF-8."""
    max_token_id: int
    """Largest id in the .bin."""
    dtype: str
    """Type of the ids on disk."""
    json_key: str
    """Field of the text in JSONL inputs."""
    tokenizer: TokenizerRecord
    inputs: list[HashedFile]
    bin: HashedFile
    idx: HashedFile
    fingerprint: str | None = None
    """Of both files, quick to compare (fingerprint.py); older manifests have none."""


def manifest_path(prefix: Path) -> Path:
    """``PREFIX.manifest.json``."""
    return prefix.with_name(prefix.name + ".manifest.json")


def read_manifest(prefix: Path) -> DatasetManifest | None:
    """Return the manifest of a dataset, None if it has none.

    Raises:
        DataError: the file is there but cannot be understood.
    """
    path = manifest_path(prefix)
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        manifest = DatasetManifest.model_validate(tree)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, ValidationError):
        raise DataError(
            f"{path}: damaged manifest; preprocess the dataset again, or remove the manifest to "
            "have the .bin scanned instead"
        ) from None
    if manifest.format != FORMAT:
        raise DataError(f"{path}: manifest format {manifest.format} is not known here (need 1)")
    return manifest


def dump_manifest(manifest: DatasetManifest) -> str:
    """Return the manifest as JSON text in ASCII (a path need not be text), ending in a newline."""
    return json.dumps(manifest.model_dump(), indent=1) + "\n"
