"""Reading raw text: order, formats, compression, and every way in which it can be broken."""

import bz2
import gzip
import io
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pltmoe.data.sources import FileSlice, InputFile, find_inputs, read_documents
from pltmoe.errors import DataError

_COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


def _read(path: Path, key: str = "text") -> list[str]:
    (file,) = find_inputs([path])
    return list(read_documents(FileSlice(file), key, lambda size: None))


def _write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def test_order_arguments_as_given_folders_sorted_each_file_once(tmp_path: Path):
    for name in ("d/b.txt", "d/a/z.txt", "d/.hidden", "d/.git/x.txt", "d/c.manifest.json", "z.txt"):
        _write(tmp_path / name, b"x")
    found = find_inputs([tmp_path / "z.txt", tmp_path / "d", tmp_path / "d" / "b.txt"])
    names = [file.path.relative_to(tmp_path).as_posix() for file in found]
    assert names == ["z.txt", "d/a/z.txt", "d/b.txt"]


def test_include_chooses_files_in_folders(tmp_path: Path):
    for name in ("a.txt", "b.jsonl", "c.jsonl.gz"):
        _write(tmp_path / name, b"x")
    found = find_inputs([tmp_path], "*.jsonl*")
    assert [(f.path.name, f.format, f.compression) for f in found] == [
        ("b.jsonl", "jsonl", ""),
        ("c.jsonl.gz", "jsonl", ".gz"),
    ]


def test_nothing_found(tmp_path: Path):
    with pytest.raises(DataError, match="missing: no such file or folder"):
        find_inputs([tmp_path / "missing"])
    with pytest.raises(DataError, match=r"no input file matches '\*\.txt' in "):
        find_inputs([tmp_path], "*.txt")


@pytest.mark.parametrize("suffix", ["", ".gz", ".bz2", ".xz"])
def test_formats_and_compressions(tmp_path: Path, suffix: str):
    compress = _COMPRESS.get(suffix, bytes)
    lines = b'{"text": "a\\n"}\n\n  \n{"text": "", "x": 1}\r\n{"text": "\xc3\xa9"}'
    assert _read(_write(tmp_path / f"t.jsonl{suffix}", compress(lines))) == ["a\n", "", "\u00e9"]
    text = b"whole file\r\n\tkept\n"
    assert _read(_write(tmp_path / f"t.txt{suffix}", compress(text))) == [text.decode()]


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("a.parquet", r'load_dataset\("parquet", data_files="a.parquet", split="train"\)\.to_json'),
        ("a.arrow", r'load_dataset\("arrow", '),
        ("A.CSV.gz", r'load_dataset\("csv", data_files="A.CSV.gz", '),
        ("a.tsv", r'load_dataset\("csv", sep="\\t", '),
    ],
)
def test_tables_are_not_text(tmp_path: Path, name: str, recipe: str):
    _write(tmp_path / "d" / name, b"text\na\n")
    with pytest.raises(DataError, match=f"{name}: .* is neither text nor JSONL; .*{recipe}"):
        find_inputs([tmp_path / "d"])


def test_text_file_too_long_for_one_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pltmoe.data.sources._MOST_TEXT", 1000)
    assert _read(_write(tmp_path / "t.txt", b"x" * 1000)) == ["x" * 1000]
    message = "a text file is one document, and this one has more than .*make JSONL of it"
    with pytest.raises(DataError, match=message):
        find_inputs([_write(tmp_path / "t.txt", b"x" * 1001)])
    (packed,) = find_inputs([_write(tmp_path / "t.txt.gz", gzip.compress(b"x" * 1001))])
    with pytest.raises(DataError, match=message):
        list(read_documents(FileSlice(packed), "text", lambda size: None))
    assert _read(_write(tmp_path / "t.jsonl", b'{"text": "a"}\n' * 100)) == ["a"] * 100


def test_zst_says_what_is_needed(tmp_path: Path):
    path = _write(tmp_path / "t.jsonl.zst", b"x")
    try:
        import backports.zstd  # noqa: F401
    except ImportError:
        with pytest.raises(
            DataError, match=r"t\.jsonl\.zst: reading \.zst needs .*backports\.zstd"
        ):
            find_inputs([path])
    else:
        from backports import zstd

        path.write_bytes(zstd.compress(b'{"text": "a"}\n'))
        assert _read(path) == ["a"]


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz"])
def test_truncated_archive(tmp_path: Path, suffix: str):
    whole = _COMPRESS[suffix](b'{"text": "some words"}\n' * 500)
    path = _write(tmp_path / f"t.jsonl{suffix}", whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"t\.jsonl\.\w+: compressed file ends too early"):
        _read(path)


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz"])
def test_no_archive_at_all(tmp_path: Path, suffix: str):
    path = _write(tmp_path / f"t.txt{suffix}", b"plain text, wrongly named" * 10)
    with pytest.raises(DataError, match=rf"not a valid \{suffix} file"):
        _read(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', r"not valid JSON \(.*\); JSONL has one object a line"),
        (b'{"text": "\xff"}', r"not UTF-8 \(byte 0xff in column 11\)"),
        (b'[{"text": "a"}]', "expected one JSON object a line, with the key 'text'; of an array"),
        (b'{"content": "a", "id": 1}', r"no key 'text' \(there are: content, id\); .*--json-key"),
        (b"{}", r"no key 'text' \(there are: none\)"),
        (b'{"text": 3}', "'text' must be a string, it is int"),
        (b'{"text": null}', "'text' must be a string, it is null; leave such lines out"),
        (b'{"text": "a\\ud83d"}', r"'text' holds half a surrogate pair \(\\ud83d\)"),
        (b'{"text": "a", "n": ' + b"9" * 5000 + b"}", "not usable JSON"),
        (b"[" * 200_000, "not usable JSON"),
    ],
    ids=["json", "utf8", "list", "key", "no-key", "type", "null", "surrogate", "number", "nesting"],
)
def test_broken_line_has_file_and_line(tmp_path: Path, line: bytes, message: str):
    path = _write(tmp_path / "t.jsonl", b'{"text": "fine"}\n\n' + line + b"\n")
    with pytest.raises(DataError, match=rf"t\.jsonl, line 3: {message}"):
        _read(path)
    (tmp_path / "t.jsonl").rename(tmp_path / "u.jsonl")
    packed = _write(tmp_path / "t.jsonl.gz", gzip.compress((tmp_path / "u.jsonl").read_bytes()))
    with pytest.raises(DataError, match=r"t\.jsonl\.gz, line 3: "):
        _read(packed)


def test_broken_line_in_a_later_slice_is_counted_from_the_top(tmp_path: Path):
    good = b'{"text": "fine"}\n'
    path = _write(tmp_path / "t.jsonl", good * 50 + b"broken\n" + good)
    piece = FileSlice(InputFile(path, "jsonl", ""), len(good) * 30 + 5, None)
    with pytest.raises(DataError, match=r"t\.jsonl, line 51: not valid JSON"):
        list(read_documents(piece, "text", lambda size: None))


def test_text_that_is_not_utf8(tmp_path: Path):
    path = _write(tmp_path / "t.txt", b"fine\nstill fine\ncaf\xe9\n")
    with pytest.raises(DataError, match=r"t\.txt, line 3: not UTF-8 \(byte 0xe9 at offset 19\)"):
        _read(path)


def test_byte_order_mark_is_not_text(tmp_path: Path):
    assert _read(_write(tmp_path / "t.jsonl", b'\xef\xbb\xbf{"text": "a"}\n')) == ["a"]
    assert _read(_write(tmp_path / "t.txt", b"\xef\xbb\xbfa\xef\xbb\xbf")) == ["a\ufeff"]


def test_unreadable(tmp_path: Path):
    (file,) = find_inputs([_write(tmp_path / "t.txt", b"x")])
    file.path.unlink()
    with pytest.raises(DataError, match=r"t\.txt: cannot be read \(No such file"):
        list(read_documents(FileSlice(file), "text", lambda size: None))


@settings(max_examples=60, deadline=None)
@given(data=st.data(), texts=st.lists(st.text(st.characters(codec="utf-8"), max_size=8)))
def test_slices_give_every_line_once(tmp_path_factory, data: st.DataObject, texts: list[str]):
    """Wherever the borders are: in a line, at its end, several within one line."""
    stream = io.BytesIO()
    for text in texts:
        stream.write(json.dumps({"text": text}).encode() + b"\n")
    size = stream.tell()
    path = _write(tmp_path_factory.getbasetemp() / "slices.jsonl", stream.getvalue())
    inner = sorted(data.draw(st.sets(st.integers(1, max(1, size - 1)), max_size=6)))
    borders = [0, *(border for border in inner if border < size), size]
    reported: list[int] = []
    found = [
        text
        for begin, end in zip(borders, borders[1:], strict=False)
        for text in read_documents(
            FileSlice(InputFile(path, "jsonl", ""), begin, end), "text", reported.append
        )
    ]
    assert found == texts
    assert sum(reported) == size
