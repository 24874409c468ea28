"""A dataset is told from another one by its fingerprint, at little cost."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from pltmoe.config.run import DataSource
from pltmoe.data.fingerprint import fingerprint, fingerprints_of
from pltmoe.data.indexed import bin_path, idx_path
from pltmoe.errors import DataError
from tests.unit.data.datasets import write_dataset


def documents(tokens: int, seed: int = 0) -> list[np.ndarray]:
    return [np.random.default_rng(seed).integers(0, 500, tokens)]


def test_a_copy_has_the_same_and_other_text_of_the_same_size_another(tmp_path: Path):
    first = write_dataset(tmp_path / "first", documents(1000))
    for path in (bin_path(first), idx_path(first)):
        shutil.copy(path, tmp_path / f"copy{path.suffix}")
    assert fingerprint(tmp_path / "copy") == fingerprint(first)
    other = write_dataset(tmp_path / "other", documents(1000, seed=1))
    assert fingerprint(other) != fingerprint(first)
    named = fingerprints_of([DataSource(path=first), DataSource(path=other)])
    assert named == {str(first): fingerprint(first), str(other): fingerprint(other)}


def test_the_same_tokens_as_other_documents(tmp_path: Path):
    whole = documents(1000)
    one = write_dataset(tmp_path / "one", whole)
    two = write_dataset(tmp_path / "two", [whole[0][:400], whole[0][400:]])
    assert fingerprint(one) != fingerprint(two)


@pytest.mark.parametrize("place", [0, 0.3, 0.7, 1])
def test_a_large_file_is_read_at_places_from_its_beginning_to_its_end(tmp_path: Path, place):
    prefix = write_dataset(tmp_path / "large", documents(8_000_000))
    before, size = fingerprint(prefix), bin_path(prefix).stat().st_size
    with bin_path(prefix).open("r+b") as stream:  # as much as a document
        stream.seek(int(place * (size - 400_000)))
        stream.write(b"\1" * 400_000)
    assert fingerprint(prefix) != before


def test_missing_and_truncated_files(tmp_path: Path):
    prefix = write_dataset(tmp_path / "text", documents(1000))
    bin_path(prefix).write_bytes(bin_path(prefix).read_bytes()[:-2])
    with pytest.raises(DataError, match=r"text\.bin: 1998 bytes, but text\.idx expects 2000"):
        fingerprint(prefix)
    bin_path(prefix).unlink()
    with pytest.raises(DataError, match=r"text\.bin: no such file"):
        fingerprint(prefix)
