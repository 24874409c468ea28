"""Megatron's indexed dataset on disk: writing the .idx, and checking a pair before it is trusted.

    PREFIX.bin   token ids, one after the other, uint16 or int32
    PREFIX.idx   b"MMIDIDX\\0\\0" | u64 version 1 | u8 dtype | u64 sequences | u64 documents + 1
                 | int32 lengths | int64 byte offsets | int64 document borders (in sequences)

The layout is that of ``megatron.core.datasets.indexed_dataset``; a test compares the bytes with its
``IndexedDatasetBuilder``. Here it is written from arrays: importing Megatron takes many times as
long as tokenizing a small corpus, and its builder keeps Python lists of every length and offset.
"""

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pltmoe.errors import DataError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
_SCAN_TOKENS = 1 << 24


@dataclass(frozen=True)
class IndexedPair:
    """A ``PREFIX.bin`` and ``PREFIX.idx`` that fit each other. Read with ``read_pair``."""

    prefix: Path
    dtype: np.dtype
    lengths: np.ndarray
    """Tokens of each sequence, int32; in our files a sequence is a document."""

    @property
    def tokens(self) -> int:
        """Tokens in the .bin."""
        return int(self.lengths.sum(dtype=np.int64))

    def largest_id(self) -> int:
        """Read the whole .bin in chunks and return the largest token id (the smallest if < 0)."""
        ids = np.memmap(bin_path(self.prefix), dtype=self.dtype, mode="r")
        largest = 0
        for start in range(0, len(ids), _SCAN_TOKENS):
            chunk = ids[start : start + _SCAN_TOKENS]
            if chunk.min() < 0:
                return int(chunk.min())
            largest = max(largest, int(chunk.max()))
        return largest

    def last_ids(self, most: int = 1000) -> np.ndarray:
        """Return the last token id of about ``most`` documents, evenly spread."""
        count, index = len(self.lengths), idx_path(self.prefix)
        offsets = np.memmap(index, np.int64, "r", _HEADER.size + 4 * count, (count,))
        borders = np.memmap(index, np.int64, "r", _HEADER.size + 12 * count)
        last = borders[1 :: max(1, len(borders) // most)] - 1
        last = last[self.lengths[last] > 0]
        ids = np.memmap(bin_path(self.prefix), dtype=self.dtype, mode="r")
        return ids[offsets[last] // self.dtype.itemsize + self.lengths[last] - 1]


def bin_path(prefix: Path) -> Path:
    """``PREFIX.bin`` (a prefix may have dots in its name)."""
    return prefix.with_name(prefix.name + ".bin")


def idx_path(prefix: Path) -> Path:
    """``PREFIX.idx``."""
    return prefix.with_name(prefix.name + ".idx")


def token_dtype(vocab_size: int) -> np.dtype:
    """Type of token ids on disk: uint16 below 65,500 pieces, as Megatron chooses, else int32."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


def write_index(path: Path, lengths: np.ndarray, dtype: np.dtype) -> None:
    """Write a .idx for sequences of ``lengths`` tokens, each a document of its own."""
    code = next(code for code, known in _DTYPES.items() if np.dtype(known) == dtype)
    count = len(lengths)
    with open(path, "wb") as stream:
        stream.write(_HEADER.pack(_MAGIC, 1, code, count, count + 1))
        stream.write(lengths.astype(np.int32))  # not tofile: it misses a full disk
        offsets = np.zeros(count, np.int64)
        np.cumsum(lengths[:-1], dtype=np.int64, out=offsets[1:])
        stream.write(offsets * dtype.itemsize)
        stream.write(np.arange(count + 1, dtype=np.int64))


def read_pair(prefix: Path) -> IndexedPair:
    """Open a dataset after checking that .bin and .idx are there, whole, and fit each other.

    Raises:
        DataError: what is missing, half-written or of another kind.
    """
    for path in (bin_path(prefix), idx_path(prefix)):
        if not path.is_file():
            raise DataError(f"{path}: no such file{_what_to_do(prefix)}")
    with open(idx_path(prefix), "rb") as stream:
        header = stream.read(_HEADER.size)
    where = idx_path(prefix)
    if len(header) < _HEADER.size or not header.startswith(_MAGIC):
        raise DataError(f"{where}: not a Megatron index, or half-written; preprocess it again")
    _, version, code, sequences, documents = _HEADER.unpack(header)
    if version != 1 or code not in _DTYPES:
        raise DataError(f"{where}: index version {version}, type {code} is not known here")
    expected = _HEADER.size + 12 * sequences + 8 * documents
    if where.stat().st_size != expected:
        raise DataError(
            f"{where}: {where.stat().st_size} bytes, but its header announces {expected}; "
            "it is half-written: preprocess it again"
        )
    lengths = np.memmap(where, np.int32, "r", _HEADER.size, (sequences,)) if sequences else []
    pair = IndexedPair(prefix, np.dtype(_DTYPES[code]), np.asarray(lengths))
    actual, needed = bin_path(prefix).stat().st_size, pair.tokens * pair.dtype.itemsize
    if actual != needed:
        raise DataError(
            f"{bin_path(prefix)}: {actual} bytes, but {where.name} expects {needed}; one is "
            "half-written or from another run: preprocess it again"
        )
    if not pair.tokens:
        raise DataError(f"{prefix}: the dataset is empty")
    return pair


def parts_folder(prefix: Path) -> Path:
    """Where finished parts wait until a preprocessing run is complete: ``PREFIX.parts``."""
    return prefix.with_name(prefix.name + ".parts")


def index_cache(prefix: Path) -> Path:
    """Where training keeps Megatron's indices of datasets in the same folder by default."""
    return prefix.parent / "index_cache"


def _what_to_do(prefix: Path) -> str:
    if parts_folder(prefix).is_dir():
        return (
            f"; preprocessing did not finish ({parts_folder(prefix)} is still there): run the same "
            "tools/preprocess_data.py command again, it continues"
        )
    return "; make the dataset with tools/preprocess_data.py"
