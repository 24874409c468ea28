"""The files on disk are Megatron's, and damage is noticed."""

from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from pltmoe.data.indexed import (
    bin_path,
    idx_path,
    parts_folder,
    read_pair,
    token_dtype,
    write_index,
)
from pltmoe.errors import DataError
from tests.small_disk import files_end_at
from tests.unit.data.datasets import write_dataset

_DOCUMENTS = [np.array([5, 6, 7, 2]), np.array([2]), np.arange(100)]


@pytest.mark.parametrize("vocab_size", [600, 65_499, 65_500, 200_000])
def test_same_bytes_as_megatron(tmp_path: Path, vocab_size: int):
    dtype = token_dtype(vocab_size)
    assert dtype == DType.optimal_dtype(vocab_size)
    ours = write_dataset(tmp_path / "ours", _DOCUMENTS, dtype)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype.type)
    for document in _DOCUMENTS:
        builder.add_document(document, [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in (".bin", ".idx"):
        theirs = (tmp_path / f"theirs{suffix}").read_bytes()
        assert (tmp_path / f"ours{suffix}").read_bytes() == theirs
    read = IndexedDataset(str(ours))
    assert [read[i].tolist() for i in range(3)] == [d.tolist() for d in _DOCUMENTS]


def test_counts_and_largest_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pltmoe.data.indexed._SCAN_TOKENS", 7)
    pair = read_pair(write_dataset(tmp_path / "a.b", _DOCUMENTS))
    assert (pair.tokens, pair.largest_id()) == (105, 99)
    negative = [np.array([1, 2, -5, 3] * 5)]
    assert read_pair(write_dataset(tmp_path / "n", negative, np.dtype(np.int32))).largest_id() == -5


def test_last_ids_of_documents_in_several_sequences(tmp_path: Path):
    """As Megatron-LM's preprocess_data.py writes them with --split-sentences."""
    builder = IndexedDatasetBuilder(str(tmp_path / "x.bin"), dtype=np.int32)
    builder.add_document(np.array([5, 6, 2]), [1, 2])
    builder.add_document(np.array([7, 8, 9, 4]), [2, 1, 1])
    builder.finalize(str(tmp_path / "x.idx"))
    pair = read_pair(tmp_path / "x")
    assert pair.last_ids().tolist() == [2, 4] and pair.last_ids(most=1).tolist() == [2]


def _truncate(path: Path, by: int) -> None:
    path.write_bytes(path.read_bytes()[:-by])


def test_half_written_bin(tmp_path: Path):
    prefix = write_dataset(tmp_path / "x", _DOCUMENTS)
    _truncate(bin_path(prefix), 1)
    with pytest.raises(DataError, match=r"x\.bin: 209 bytes, but x\.idx expects 210"):
        read_pair(prefix)


@pytest.mark.parametrize("by", [1, 40, 60])
def test_half_written_idx(tmp_path: Path, by: int):
    prefix = write_dataset(tmp_path / "x", _DOCUMENTS)
    _truncate(idx_path(prefix), by)
    with pytest.raises(DataError, match=r"x\.idx: \d+ bytes, but its header announces \d+"):
        read_pair(prefix)


def test_index_that_does_not_fit_on_the_disk(tmp_path: Path):
    """numpy's tofile says nothing of it."""
    lengths, dtype = np.array([4, 1, 100]), np.dtype(np.uint16)
    with files_end_at(100), pytest.raises(OSError, match="File too large"):
        write_index(tmp_path / "x.idx", lengths, dtype)


@pytest.mark.parametrize("content", [b"", b"MMIDIDX\x00\x00", b"x" * 100])
def test_not_an_index(tmp_path: Path, content: bytes):
    prefix = write_dataset(tmp_path / "x", _DOCUMENTS)
    idx_path(prefix).write_bytes(content)
    with pytest.raises(DataError, match=r"x\.idx: not a Megatron index, or half-written"):
        read_pair(prefix)


def test_index_of_another_version(tmp_path: Path):
    prefix = write_dataset(tmp_path / "x", _DOCUMENTS)
    content = bytearray(idx_path(prefix).read_bytes())
    content[9] = 9
    idx_path(prefix).write_bytes(content)
    with pytest.raises(DataError, match=r"x\.idx: index version 9, type 8 is not known here"):
        read_pair(prefix)


def test_empty(tmp_path: Path):
    with pytest.raises(DataError, match="x: the dataset is empty"):
        read_pair(write_dataset(tmp_path / "x", []))


def test_missing_says_how_to_make_or_continue(tmp_path: Path):
    prefix = tmp_path / "x"
    with pytest.raises(DataError, match=r"x\.bin: no such file; make the dataset with tools/"):
        read_pair(prefix)
    parts_folder(prefix).mkdir()
    with pytest.raises(DataError, match=r"did not finish .*run the same .* again, it continues"):
        read_pair(prefix)
