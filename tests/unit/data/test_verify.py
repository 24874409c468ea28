"""What is refused before training starts, because data, tokenizer and model do not fit."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pltmoe.config import RunConfig
from pltmoe.data.datasets import build_datasets
from pltmoe.data.indexed import bin_path, idx_path
from pltmoe.data.manifest import manifest_path
from pltmoe.data.preprocess import PreprocessOptions, preprocess
from pltmoe.data.tokenizer import Tokenizer
from pltmoe.data.tokenizer_training import TrainingOptions, train_tokenizer
from pltmoe.errors import DataError
from tests.unit.data.datasets import (
    all_batches,
    counting_documents,
    run_config,
    tokens_of,
    write_dataset,
)


@pytest.fixture
def prepared(tmp_path: Path, jsonl: Path, tokenizer: Tokenizer) -> Path:
    prefix = tmp_path / "prepared"
    preprocess([jsonl], prefix, tokenizer.model_path, PreprocessOptions(progress=False))
    return prefix


def _refused(config: RunConfig, tokenizer: Tokenizer, message: str, samples=(20, 0, 0)) -> None:
    with pytest.raises(DataError, match=message):
        build_datasets(config, tokenizer, samples)


def test_vocabulary_larger_than_the_model(tokenizer: Tokenizer, counting: Path):
    config = run_config(tokenizer, counting, vocab_size=512)
    _refused(config, tokenizer, r"model\.vocab_size \(512\) is smaller than .* \(600\)")


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        (500, r"vocabulary of 600 pieces, but .* has 500"),
        (600, "another tokenizer of the same size"),
    ],
)
def test_another_tokenizer(prepared: Path, tmp_path: Path, corpus: Path, pieces: int, message: str):
    options = TrainingOptions(vocab_size=pieces, max_bytes=100_000)
    other = train_tokenizer([corpus], tmp_path / "other.model", options, progress=False)
    _refused(run_config(other, prepared), other, message)


def test_a_file_replaced_by_one_of_the_same_size(tokenizer: Tokenizer, prepared: Path):
    data = bytearray(bin_path(prepared).read_bytes())
    data[100] ^= 1
    bin_path(prepared).write_bytes(data)
    _refused(
        run_config(tokenizer, prepared), tokenizer, "are not the files that .*json was written"
    )


def test_files_of_another_run(tokenizer: Tokenizer, prepared: Path):
    write_dataset(prepared, counting_documents())
    _refused(run_config(tokenizer, prepared), tokenizer, r"prepared\.manifest\.json recorded \d+")


@pytest.mark.parametrize(("bad", "dtype"), [(600, "u2"), (60_000, "u2"), (-6, "i4")])
def test_token_id_out_of_range_without_a_manifest(
    tokenizer: Tokenizer, tmp_path: Path, bad: int, dtype: str
):
    prefix = write_dataset(tmp_path / "x", [np.array([5, 6, bad, 7] * 50)], np.dtype(dtype))
    message = rf"x\.bin: holds token id {bad}, but .* 0 \.\. 599"
    _refused(run_config(tokenizer, prefix), tokenizer, message)


def test_token_id_out_of_range_in_the_manifest(tokenizer: Tokenizer, prepared: Path):
    text = manifest_path(prepared).read_text()
    at = text.index('"max_token_id"')
    manifest_path(prepared).write_text(
        text[:at] + '"max_token_id": 999,' + text[text.index(",", at) + 1 :]
    )
    _refused(run_config(tokenizer, prepared), tokenizer, "holds token id 999")


def test_scan_is_done_once_for_a_file_as_it_is(
    tokenizer: Tokenizer, counting: Path, monkeypatch: pytest.MonkeyPatch
):
    build_datasets(run_config(tokenizer, counting), tokenizer, (20, 0, 0))
    with monkeypatch.context() as patch:
        patch.setattr("pltmoe.data.indexed.IndexedPair.largest_id", None)
        build_datasets(run_config(tokenizer, counting), tokenizer, (20, 0, 0))
    content = bin_path(counting).read_bytes()
    bin_path(counting).write_bytes(content[:-2] + b"\xff\xff")
    _refused(run_config(tokenizer, counting), tokenizer, "holds token id 65535")


def test_documents_of_elsewhere_that_do_not_end(tokenizer: Tokenizer, tmp_path: Path, caplog):
    """Nothing else tells another tokenizer of a size that fits."""
    prefix = write_dataset(tmp_path / "x", [np.full(100, 5)] * 10)
    build_datasets(run_config(tokenizer, prefix), tokenizer, (5, 0, 0))
    assert "does not learn where a text ends" in caplog.text
    for field in ("reset_position_ids", "mask_document_ends"):
        config = run_config(tokenizer, prefix, **{field: True})
        _refused(config, tokenizer, rf"no document ends with id 2, .*{field} would do nothing")


@pytest.mark.parametrize("missing", [bin_path, idx_path])
def test_missing_file(tokenizer: Tokenizer, counting: Path, missing: Any):
    missing(counting).unlink()
    _refused(run_config(tokenizer, counting), tokenizer, r"counting\.(bin|idx): no such file")
    assert not (counting.parent / "index_cache").exists(), "nothing is made beside a mistyped path"


def test_part_of_the_split_without_documents(tokenizer: Tokenizer, tmp_path: Path):
    """Megatron would count epochs of nothing for ever."""
    prefix = write_dataset(tmp_path / "x", [np.full(100, 5)] * 10)
    config = run_config(tokenizer, prefix, split=(98, 2, 0))
    _refused(config, tokenizer, r"leaves none of the 10 documents of .* for 'valid'", (5, 1, 0))
    assert build_datasets(config, tokenizer, (5, 0, 0))[1] is None


def test_short_part_of_the_split_is_told(tokenizer: Tokenizer, tmp_path: Path, caplog):
    prefix = write_dataset(tmp_path / "x", [np.full(10, 5)] * 10)
    build_datasets(run_config(tokenizer, prefix, split=(90, 10, 0)), tokenizer, (5, 2, 0))
    assert "has 10 tokens for 'valid', less than one sequence (16)" in caplog.text


@pytest.mark.parametrize(
    ("data", "samples", "message"),
    [
        ({}, (5, 1, 0), r"1 sequences for 'valid' are wanted, .* or set data\.valid"),
        ({}, (5, 0, 1), "1 sequences for 'test' are wanted, but nothing says"),
        ({"split": (100, 0, 0)}, (5, 1, 0), "for 'valid' are wanted"),
    ],
)
def test_samples_from_nowhere(tokenizer: Tokenizer, counting: Path, data, samples, message):
    _refused(run_config(tokenizer, counting, **data), tokenizer, message, samples)


def test_cache_that_cannot_be_written(tokenizer: Tokenizer, counting: Path, tmp_path: Path):
    (tmp_path / "file").write_text("")
    config = run_config(tokenizer, counting, cache_dir=tmp_path / "file" / "cache")
    _refused(config, tokenizer, r"the index cache cannot be written there \(Not a directory\)")


def test_prepared_data_is_accepted(tokenizer: Tokenizer, prepared: Path):
    train, _, _ = build_datasets(run_config(tokenizer, prepared), tokenizer, (20, 0, 0))
    text = tokenizer.decode(t for row in tokens_of(all_batches(train)) for t in row)
    assert "document 1" in text
