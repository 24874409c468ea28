"""Reading raw text: which files, in which order, and one document after the other.

A text file is one document, of at most 64 MiB. A JSONL file has one document a line, a string under
``json_key``. Both may be compressed. Everything that can be wrong with them is a DataError with the
file and, for JSONL, the line.
"""

import bz2
import fnmatch
import gzip
import importlib
import json
import lzma
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import IO, Literal

from pltmoe.errors import DataError

Report = Callable[[int], None]
"""Told how many more bytes of the input file (as stored) have been read."""

_JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
_COMPRESSED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst")
_MANIFEST_SUFFIX = ".manifest.json"
_TABLES = {
    ".parquet": '"parquet"',
    ".arrow": '"arrow"',
    ".csv": '"csv"',
    ".tsv": '"csv", sep="\\t"',
}
"""Formats that are not text, and what reads them in the package datasets."""
_MOST_TEXT = 64 << 20
"""Bytes of a text file: sentencepiece takes about 47 times a document's size in memory."""


@dataclass(frozen=True)
class InputFile:
    """One file of raw text and how to read it."""

    path: Path
    format: Literal["text", "jsonl"]
    compression: str
    """One of .gz .bz2 .xz .zst, or empty."""

    @property
    def kind(self) -> tuple[str, str]:
        """What decides, besides its bytes, which text is in it."""
        return self.format, self.compression


@dataclass(frozen=True)
class FileSlice:
    """The lines of a JSONL file that start in ``[begin, end)`` bytes; ``end`` None = all of it."""

    file: InputFile
    begin: int = 0
    end: int | None = None


def find_inputs(paths: Sequence[Path], include: str = "*") -> list[InputFile]:
    """List the files to read: arguments in the order given, folders sorted by path, each file once.

    Hidden files and ``*.manifest.json`` in folders are left out, as is what does not match
    ``include`` (a pattern for the file name, e.g. ``*.jsonl.gz``).

    Raises:
        DataError: a path does not exist, a format or compression cannot be read here, a text file
            is too long for one document, or there is no file.
    """
    found: dict[Path, InputFile] = {}
    for path in paths:
        if path.is_dir():
            members = sorted(p for p in path.rglob("*") if _is_wanted(p, path, include))
        elif path.is_file():
            members = [path]
        else:
            raise DataError(f"{path}: no such file or folder")
        for member in members:
            found.setdefault(member.resolve(), _describe(member))
    if not found:
        names = ", ".join(str(path) for path in paths)
        raise DataError(f"no input file matches '{include}' in {names or 'no inputs at all'}")
    return list(found.values())


def read_documents(piece: FileSlice, json_key: str, report: Report) -> Iterator[str]:
    """Yield the documents of a text file or of a slice of a JSONL file, empty ones included.

    Raises:
        DataError: unreadable or truncated file, a text file that is too long, broken UTF-8, broken
            JSON, missing or wrong key.
    """
    path = piece.file.path
    try:
        if piece.file.format == "text":
            yield _read_text(piece.file)
            report(path.stat().st_size)
        else:
            yield from _read_json_lines(piece, json_key, report)
    except EOFError:
        raise DataError(f"{path}: compressed file ends too early; was it copied whole?") from None
    except _bad_archive() as error:
        raise DataError(f"{path}: not a valid {piece.file.compression} file ({error})") from None
    except OSError as error:
        if error.errno is None and piece.file.compression:  # bz2 reports bad data as a bare OSError
            message = f"{path}: not a valid {piece.file.compression} file ({error})"
            raise DataError(message) from None
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None


def _is_wanted(path: Path, root: Path, include: str) -> bool:
    relative = path.relative_to(root)
    hidden = any(part.startswith(".") for part in relative.parts)
    named = fnmatch.fnmatchcase(path.name, include) and not path.name.endswith(_MANIFEST_SUFFIX)
    return named and not hidden and path.is_file()


def reading_of(path: Path) -> InputFile:
    """Say how a file of this name is read; there need not be one."""
    name, compression = path.name.lower(), ""
    for suffix in _COMPRESSED_SUFFIXES:
        if name.endswith(suffix):
            name, compression = name.removesuffix(suffix), suffix
    return InputFile(path, "jsonl" if name.endswith(_JSON_SUFFIXES) else "text", compression)


def _describe(path: Path) -> InputFile:
    file = reading_of(path)
    suffix = Path(path.name.lower().removesuffix(file.compression)).suffix
    if suffix in _TABLES:
        raise DataError(
            f"{path}: {suffix} is neither text nor JSONL; make JSONL of it, with the package "
            f'datasets: load_dataset({_TABLES[suffix]}, data_files="{path.name}", split="train")'
            '.to_json("x.jsonl"); or leave it out'
        )
    if file.format == "text" and path.stat().st_size > _MOST_TEXT:
        raise _too_long(path)
    if file.compression == ".zst" and _zstd() is None:
        raise DataError(
            f"{path}: reading .zst needs Python 3.14 or the package backports.zstd "
            "(pip install backports.zstd); or decompress it first, e.g. with zstd -d"
        )
    return file


def _too_long(path: Path) -> DataError:
    return DataError(
        f"{path}: a text file is one document, and this one has more than {_MOST_TEXT >> 20} MiB; "
        'make JSONL of it, one document a line: {"text": "..."}'
    )


def _zstd() -> ModuleType | None:
    """Return Python's zstd module (3.14), or its backport, or None."""
    for name in ("compression.zstd", "backports.zstd"):
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    return None


def _bad_archive() -> tuple[type[Exception], ...]:
    """Errors that mean the compressed data is not valid."""
    zstd = _zstd()
    return (gzip.BadGzipFile, zlib.error, lzma.LZMAError, *([zstd.ZstdError] if zstd else []))


def _decompress(raw: IO[bytes], compression: str) -> IO[bytes]:
    if compression == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if compression == ".bz2":
        return bz2.BZ2File(raw)
    if compression == ".xz":
        return lzma.LZMAFile(raw)
    if compression == ".zst":
        zstd = _zstd()
        assert zstd is not None  # checked when the inputs were listed
        return zstd.ZstdFile(raw)
    return raw


def _read_text(file: InputFile) -> str:
    with open(file.path, "rb") as raw, _decompress(raw, file.compression) as stream:
        content = stream.read(_MOST_TEXT + 1)
    if len(content) > _MOST_TEXT:
        raise _too_long(file.path)
    try:
        return content.decode("utf-8").removeprefix("\ufeff")  # a byte order mark
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{file.path}, line {line}: not UTF-8 (byte 0x{content[error.start]:02x} at offset "
            f"{error.start}); convert it, e.g. with iconv -t UTF-8, or leave the file out"
        ) from None


def _read_json_lines(piece: FileSlice, json_key: str, report: Report) -> Iterator[str]:
    with open(piece.file.path, "rb") as raw, _decompress(raw, piece.file.compression) as stream:
        if piece.begin:
            raw.seek(piece.begin - 1)
            raw.readline()  # the line that crosses the border belongs to the slice before
        reported = raw.tell() if piece.begin else 0
        start, count = reported, 0  # of the line; counted in decompressed bytes
        while (piece.end is None or start < piece.end) and (line := stream.readline()):
            if not line.isspace():
                text = _parse_line(line, json_key)
                if isinstance(text, DataError):
                    number = count + 1 + _lines_before(piece)
                    raise DataError(f"{piece.file.path}, line {number}: {text}")
                yield text
            start, count = start + len(line), count + 1
            report(raw.tell() - reported)
            reported = raw.tell()


def _lines_before(piece: FileSlice) -> int:
    """Count the lines that start before the slice; only needed to word an error."""
    with open(piece.file.path, "rb") as stream:
        if not piece.begin:
            return 0
        count = 0
        while stream.tell() < piece.begin and stream.readline():
            count += 1
        return count


def _parse_line(line: bytes, json_key: str) -> str | DataError:
    """Return the text of a JSONL line, or what is wrong with it (the caller knows where)."""
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return DataError(f"not UTF-8 (byte 0x{line[error.start]:02x} in column {error.start + 1})")
    except json.JSONDecodeError as error:
        where = f"{error.msg}, column {error.colno}"
        return DataError(f"not valid JSON ({where}); JSONL has one object a line")
    except (ValueError, RecursionError) as error:  # a number or a nesting without end
        return DataError(f"not usable JSON ({error})")
    if not isinstance(record, dict):
        return DataError(
            f"expected one JSON object a line, with the key '{json_key}'; of an array, "
            "jq -c '.[]' makes that"
        )
    if json_key not in record:
        keys = ", ".join(sorted(record)[:8]) or "none"
        return DataError(f"no key '{json_key}' (there are: {keys}); choose one with --json-key")
    if not isinstance(record[json_key], str):
        value = record[json_key]
        kind = "null" if value is None else type(value).__name__
        return DataError(f"'{json_key}' must be a string, it is {kind}; leave such lines out")
    try:
        record[json_key].encode("utf-8")  # JSON can spell what Unicode cannot store
    except UnicodeEncodeError as error:
        code = ord(record[json_key][error.start])
        return DataError(f"'{json_key}' holds half a surrogate pair (\\u{code:04x}): not Unicode")
    return record[json_key]
