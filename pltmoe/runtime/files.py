"""Files that have to be whole after a crash, and the same after a copy. Needs no torch."""

import hashlib
import os
from pathlib import Path


def flush_to_disk(path: Path) -> None:
    """Put a file, or the names in a folder, on disk for good: a rename cannot outlive it then."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
