"""A cheap fingerprint of an indexed dataset: sizes, and the bytes at evenly spread places.

A corpus can have terabytes; reading all of it at every start would cost more than it saves. A
dataset that was made anew from other text, or with another tokenizer, differs nearly everywhere,
and in its sizes; 64 places find it. A few changed bytes between them are not found: for that there
are the full checksums in ``PREFIX.manifest.json``.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from pltmoe.config.run import DataSource
from pltmoe.data.indexed import bin_path, idx_path, read_pair
from pltmoe.errors import DataError

_PLACES = 64
_PLACE_BYTES = 64 << 10


def fingerprints_of(sources: Iterable[DataSource]) -> dict[str, str]:
    """Return the fingerprint of each source by its path as it is written in the configuration.

    Raises:
        DataError: a file is missing, half-written or of another kind.
    """
    return {str(source.path): fingerprint(source.path) for source in sources}


def fingerprint(prefix: Path) -> str:
    """Return 64 hexadecimal digits for ``PREFIX.bin`` and ``PREFIX.idx``.

    Raises:
        DataError: see ``fingerprints_of``.
    """
    read_pair(prefix)
    return fingerprint_of_files(bin_path(prefix), idx_path(prefix))


def fingerprint_of_files(tokens: Path, index: Path) -> str:
    """Return the fingerprint of a .bin and .idx of any name.

    Raises:
        DataError: one cannot be read.
    """
    digest = hashlib.sha256()
    for path in (tokens, index):
        try:
            _add(digest, path)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    return digest.hexdigest()


def _add(digest: "hashlib._Hash", path: Path) -> None:
    size = path.stat().st_size
    digest.update(f"{size};".encode())
    last = max(0, size - _PLACE_BYTES)
    with path.open("rb") as stream:
        for start in sorted({last * place // (_PLACES - 1) for place in range(_PLACES)}):
            stream.seek(start)
            digest.update(stream.read(_PLACE_BYTES))
