"""A corpus that every machine has: the source files of Python's own standard library.

One JSONL line a file: ``{"text": ..., "path": "json/decoder.py"}``. Lines are ordered by the hash
of the path, so that any prefix of the corpus, and the tail that a split keeps for validation, is a
fair sample of the whole.
"""

import hashlib
import json
import logging
import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pltmoe.data.atomic import complete_file
from pltmoe.errors import DataError
from pltmoe.runtime.files import sha256_of

log = logging.getLogger(__name__)

_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "lib2to3"}
_TEST_FOLDERS = {"test", "tests", "idle_test"}


def build_corpus(
    output: Path,
    *,
    max_bytes: int | None = None,
    include_tests: bool = False,
    library: Path | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Write the standard library's sources as JSONL to ``output``; return the manifest.

    ``max_bytes`` ends the corpus before the first file that would exceed it (bytes of source text).
    Beside it, ``NAME.jsonl.manifest.json`` counts and hashes; with it, a second call that
    finds everything as recorded writes nothing.

    Raises:
        DataError: there is no source file, or ``max_bytes`` is too small for a single one.
    """
    library = library or Path(sysconfig.get_path("stdlib"))
    wanted: dict[str, Any] = {
        "python": platform.python_version(),
        "library": str(library),
        "max_bytes": max_bytes,
        "include_tests": include_tests,
    }
    if manifest := _reusable(output, wanted):
        log.info("%s: up to date, reused", output)
        return manifest
    paths = _ordered(library, include_tests)
    if not paths:
        raise DataError(f"{library}: no Python source files; is the standard library installed?")
    manifest = {**wanted, "documents": 0, "bytes": 0, "not_utf8": 0}
    with complete_file(output) as temporary:
        with open(temporary, "w", encoding="utf-8", newline="\n") as stream:
            for line in _lines(library, paths, manifest, progress):
                stream.write(line)
        if not manifest["documents"]:
            raise DataError(f"{output}: max_bytes ({max_bytes}) is too small for a single file")
        manifest["sha256"] = sha256_of(temporary)
    with complete_file(manifest_path(output)) as temporary:
        temporary.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return manifest


def manifest_path(output: Path) -> Path:
    """``corpus.jsonl.manifest.json``: a dataset made beside it has ``corpus.manifest.json``."""
    return output.with_name(output.name + ".manifest.json")


def _reusable(output: Path, wanted: dict[str, Any]) -> dict[str, Any] | None:
    try:
        manifest = json.loads(manifest_path(output).read_text(encoding="utf-8"))
        same = all(manifest.get(key) == value for key, value in wanted.items())
        return manifest if same and sha256_of(output) == manifest["sha256"] else None
    except (OSError, ValueError, KeyError, AttributeError):
        return None


def _ordered(library: Path, include_tests: bool) -> list[Path]:
    skipped = _SKIPPED_FOLDERS | (set() if include_tests else _TEST_FOLDERS)
    names = [
        path.relative_to(library).as_posix()
        for path in library.rglob("*.py")
        if not skipped & set(path.relative_to(library).parts)
    ]
    return [library / name for name in sorted(names, key=_order)]


def _order(name: str) -> tuple[str, str]:
    return hashlib.sha256(name.encode()).hexdigest(), name


def _lines(
    library: Path, paths: list[Path], manifest: dict[str, Any], progress: bool
) -> Iterator[str]:
    """Yield JSONL lines and count into ``manifest``; the few files not in UTF-8 are left out."""
    for path in tqdm(paths, desc="source files", unit="file", disable=not progress):
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            manifest["not_utf8"] += 1
            continue
        size = len(text.encode())
        if manifest["max_bytes"] is not None and manifest["bytes"] + size > manifest["max_bytes"]:
            return
        if text.strip():
            manifest["documents"] += 1
            manifest["bytes"] += size
            name = path.relative_to(library).as_posix()
            yield json.dumps({"text": text, "path": name}, ensure_ascii=False) + "\n"
