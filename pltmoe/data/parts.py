"""Parts: the units of work of preprocessing, and what makes it resumable.

A part is a group of text files or a slice of a JSONL file. Its name is the hash of everything that
decides its bytes (contents, tokenizer, options), so a part that is there is right, whichever run
wrote it. Three files: NAME.bin (token ids), NAME.lengths (int32), and NAME.json, written last.

numpy's ``tofile`` and ``save`` are not used for writing: they do not notice a full disk.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from pltmoe.data.atomic import complete_file
from pltmoe.data.indexed import token_dtype
from pltmoe.data.sources import FileSlice, InputFile, Report, read_documents
from pltmoe.data.tokenizer import Tokenizer, load_tokenizer
from pltmoe.errors import DataError

_FORMAT = 2  # raise it when the same text and options would give other bytes
_LENGTH = np.dtype(np.int32)


@dataclass(frozen=True)
class Fingerprint:
    """What a file held when it was hashed."""

    sha256: str
    bytes: int
    modified_ns: int


@dataclass(frozen=True)
class Part:
    """Slices to tokenize one after the other into one set of files."""

    name: str
    slices: tuple[FileSlice, ...]
    fingerprints: tuple[Fingerprint, ...]
    folder: Path
    tokenizer: Path
    json_key: str


@dataclass(frozen=True)
class PartCounts:
    """What a finished part holds."""

    documents: int = 0
    empty_documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    max_token_id: int = 0


def fingerprint(file: InputFile, report: Report) -> Fingerprint:
    """Hash a file.

    Raises:
        DataError: it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        before = file.path.stat()
        with open(file.path, "rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
                report(len(block))
    except OSError as error:
        raise DataError(f"{file.path}: cannot be read ({error.strerror})") from None
    return Fingerprint(digest.hexdigest(), before.st_size, before.st_mtime_ns)


def plan_parts(
    files: Sequence[InputFile],
    fingerprints: Sequence[Fingerprint],
    *,
    tokenizer: Tokenizer,
    json_key: str,
    part_bytes: int,
    folder: Path,
) -> list[Part]:
    """Divide the inputs, in order, into parts of about ``part_bytes`` each.

    The partition does not change the dataset, only the size of what is redone after a kill. A
    compressed file is never divided: it cannot be entered in the middle.
    """
    groups: list[list[tuple[FileSlice, Fingerprint]]] = []
    room = 0
    for file, mark in zip(files, fingerprints, strict=True):
        for piece in _slices(file, mark.bytes, part_bytes):
            size = (piece.end or mark.bytes) - piece.begin
            if not groups or size > room:
                groups.append([])
                room = part_bytes
            groups[-1].append((piece, mark))
            room -= size
    decides = (_FORMAT, tokenizer.sha256, json_key)
    return [
        Part(
            name=_name(group, decides),
            slices=tuple(piece for piece, _ in group),
            fingerprints=tuple(mark for _, mark in group),
            folder=folder,
            tokenizer=tokenizer.model_path,
            json_key=json_key,
        )
        for group in groups
    ]


def read_counts(part: Part) -> PartCounts | None:
    """Return the counts of a finished part, None if it has to be written (again)."""
    try:
        counts = PartCounts(**json.loads(part_file(part, ".json").read_text(encoding="utf-8")))
        lengths = part_file(part, ".lengths").stat().st_size
        size = part_file(part, ".bin").stat().st_size
    except (OSError, ValueError, TypeError):
        return None
    itemsize = token_dtype(_tokenizer(part.tokenizer).vocab_size).itemsize
    whole = (size, lengths) == (counts.tokens * itemsize, counts.documents * _LENGTH.itemsize)
    return counts if whole else None


def read_lengths(part: Part) -> np.ndarray:
    """Return the tokens of each document of a finished part, int32."""
    return np.frombuffer(part_file(part, ".lengths").read_bytes(), _LENGTH)


def write_part(part: Part, report: Report) -> PartCounts:
    """Tokenize the documents of a part; its files appear complete or not at all.

    Raises:
        DataError: broken input, or a file that changed while it was read.
        OSError: a part cannot be written, e.g. a full disk; names the file.
    """
    lengths: list[int] = []
    counts = dict.fromkeys(asdict(PartCounts()), 0)
    with complete_file(part_file(part, ".bin")) as temporary:
        _write_tokens(part, temporary, lengths, counts, report)
        _check_unchanged(part)
    with complete_file(part_file(part, ".lengths")) as temporary:
        temporary.write_bytes(np.array(lengths, _LENGTH).tobytes())
    with complete_file(part_file(part, ".json")) as temporary:
        temporary.write_text(json.dumps(counts), encoding="utf-8")
    return PartCounts(**counts)


def part_file(part: Part, suffix: str) -> Path:
    """Path of one of a part's files."""
    return part.folder / (part.name + suffix)


def _slices(file: InputFile, size: int, part_bytes: int) -> list[FileSlice]:
    if file.format == "text" or file.compression or size <= part_bytes:
        return [FileSlice(file)]
    borders = list(range(0, size, part_bytes)) + [size]
    return [FileSlice(file, a, b) for a, b in zip(borders, borders[1:], strict=False)]


def _name(group: list[tuple[FileSlice, Fingerprint]], decides: tuple[object, ...]) -> str:
    contents = [
        (mark.sha256, piece.file.format, piece.file.compression, piece.begin, piece.end)
        for piece, mark in group
    ]
    return hashlib.sha256(json.dumps([decides, contents]).encode()).hexdigest()[:32]


def _write_tokens(
    part: Part, path: Path, lengths: list[int], counts: dict[str, int], report: Report
) -> None:
    tokenizer = _tokenizer(part.tokenizer)
    dtype = token_dtype(tokenizer.vocab_size)
    with open(path, "wb") as stream:
        for piece in part.slices:
            for text in read_documents(piece, part.json_key, report):
                if not text.strip():
                    counts["empty_documents"] += 1
                    continue
                ids = np.array([*tokenizer.encode(text), tokenizer.eod], dtype)
                stream.write(ids)
                lengths.append(len(ids))
                counts["documents"] += 1
                counts["tokens"] += len(ids)
                counts["text_bytes"] += len(text.encode())
                counts["max_token_id"] = max(counts["max_token_id"], int(ids.max()))


def _check_unchanged(part: Part) -> None:
    for piece, mark in zip(part.slices, part.fingerprints, strict=True):
        now = piece.file.path.stat()
        if (now.st_size, now.st_mtime_ns) != (mark.bytes, mark.modified_ns):
            raise DataError(f"{piece.file.path}: changed while it was read; run the command again")


@lru_cache(maxsize=1)
def _tokenizer(path: Path) -> Tokenizer:
    """Load the tokenizer once per worker."""
    return load_tokenizer(path)
