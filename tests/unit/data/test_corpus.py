"""The corpus from Python's standard library."""

import json
from pathlib import Path

import pytest

from pltmoe.data.corpus import build_corpus, manifest_path
from pltmoe.errors import DataError


@pytest.fixture
def library(tmp_path: Path) -> Path:
    root = tmp_path / "lib"
    for name in ("a.py", "b/c.py", "b/d.py", "test/t.py", "site-packages/x.py", "e.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"# {name}\r\n\tx = 1\n", newline="")
    (root / "empty.py").write_text("")
    (root / "latin.py").write_bytes(b"# caf\xe9\n")
    return root


def _read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_one_line_a_file_text_untouched(library: Path, tmp_path: Path):
    output = tmp_path / "c.jsonl"
    manifest = build_corpus(output, library=library, progress=False)
    records = _read(output)
    assert sorted(record["path"] for record in records) == ["a.py", "b/c.py", "b/d.py", "e.py"]
    assert all(record["text"] == f"# {record['path']}\r\n\tx = 1\n" for record in records)
    assert (manifest["documents"], manifest["not_utf8"]) == (4, 1)
    assert manifest["bytes"] == sum(len(record["text"]) for record in records)


def test_order_is_fixed_and_a_smaller_corpus_is_a_prefix(library: Path, tmp_path: Path):
    build_corpus(tmp_path / "all.jsonl", library=library, progress=False)
    build_corpus(tmp_path / "again.jsonl", library=library, progress=False)
    build_corpus(tmp_path / "part.jsonl", library=library, max_bytes=45, progress=False)
    whole = (tmp_path / "all.jsonl").read_text()
    assert (tmp_path / "again.jsonl").read_text() == whole
    part = (tmp_path / "part.jsonl").read_text()
    assert whole.startswith(part) and len(_read(tmp_path / "part.jsonl")) == 2


def test_tests_on_request(library: Path, tmp_path: Path):
    manifest = build_corpus(
        tmp_path / "c.jsonl", library=library, include_tests=True, progress=False
    )
    assert manifest["documents"] == 5


def test_second_run_reuses_unless_changed(library: Path, tmp_path: Path):
    output = tmp_path / "c.jsonl"
    first = build_corpus(output, library=library, progress=False)
    before = output.stat().st_mtime_ns
    assert build_corpus(output, library=library, progress=False) == first
    assert output.stat().st_mtime_ns == before
    output.write_text("damaged")
    assert build_corpus(output, library=library, progress=False) == first
    assert len(_read(output)) == 4
    assert manifest_path(output) == tmp_path / "c.jsonl.manifest.json"


def test_too_small(library: Path, tmp_path: Path):
    with pytest.raises(DataError, match=r"max_bytes \(3\) is too small for a single file"):
        build_corpus(tmp_path / "c.jsonl", library=library, max_bytes=3, progress=False)
    assert not list(tmp_path.glob("*c.*"))


def test_no_sources(tmp_path: Path):
    with pytest.raises(DataError, match="no Python source files"):
        build_corpus(tmp_path / "c.jsonl", library=tmp_path, progress=False)


def test_real_standard_library(corpus: Path):
    """Real text: of the size asked for, without tests, and ordered so that a tail is a sample."""
    records = _read(corpus)
    size = sum(len(record["text"].encode()) for record in records)
    assert 4_000_000 < size <= 5_000_000
    paths = [record["path"] for record in records]
    left_out = {"test", "tests", "site-packages", "__pycache__"}
    assert not any(left_out & set(path.split("/")) for path in paths)
    tops = {path.split("/")[0] for path in paths[-40:]}
    assert len(tops) > 15
