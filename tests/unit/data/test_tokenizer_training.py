"""Training: deterministic, reused, and clear about vocabularies that do not fit."""

import json
from pathlib import Path

import pytest

from pltmoe.data.sources import find_inputs
from pltmoe.data.tokenizer import Tokenizer
from pltmoe.data.tokenizer_training import (
    TrainingOptions,
    _sample,
    manifest_path,
    train_tokenizer,
)
from pltmoe.errors import DataError

_WORDS = "the quick brown fox jumps over a lazy dog while seven wizards vex it quite boldly\n"


def _text(folder: Path, content: str = _WORDS * 30) -> Path:
    path = folder / "text.txt"
    path.write_text(content)
    return path


def _train(inputs: list[Path], output: Path, vocab_size: int = 320, **options: object) -> Tokenizer:
    return train_tokenizer(inputs, output, TrainingOptions(vocab_size, **options), progress=False)


def test_same_text_same_bytes(tmp_path: Path):
    text = _text(tmp_path)
    first = _train([text], tmp_path / "a.model")
    second = _train([text], tmp_path / "b.model")
    assert first.sha256 == second.sha256


def test_second_run_reuses_and_other_options_train_anew(tmp_path: Path):
    text, output = _text(tmp_path), tmp_path / "t.model"
    _train([text], output)
    before = output.stat().st_mtime_ns
    _train([text], output)
    assert output.stat().st_mtime_ns == before
    assert _train([text], output, 330).vocab_size == 330
    text.write_text(_WORDS * 31)
    _train([text], output, 330)
    manifest = json.loads(manifest_path(output).read_text())
    assert manifest["options"]["vocab_size"] == 330
    text.write_text(json.dumps({"text": _WORDS * 31}) + "\n")
    as_text = _train([text], output, 330).sha256
    as_json = _train([text.rename(tmp_path / "text.json")], output, 330).sha256
    assert as_json != as_text, "the same bytes under another name are another text"
    text.write_text(_WORDS * 31)
    output.write_bytes(b"damaged")
    assert _train([text], output, 330).vocab_size == 330


def test_sample_has_about_the_size_asked_for(corpus: Path):
    options = TrainingOptions(vocab_size=600, max_bytes=500_000)
    sample = _sample(find_inputs([corpus]), options, progress=False)
    assert 350_000 < sum(len(chunk.encode()) for chunk in sample) < 650_000
    assert max(map(len, sample)) <= 2000
    assert sample == _sample(find_inputs([corpus]), options, progress=False)


def test_marks_of_sentencepiece_in_the_text_are_not_learned(tmp_path: Path):
    """A learned U+2581 would make decode turn it into a space; U+2585 would drop its whole line."""
    text = _text(tmp_path, ("\u2581\u2585\x00" * 5 + "rareword ") * 100 + _WORDS * 10)
    tokenizer = _train([text], tmp_path / "t.model")
    assert tokenizer.decode(tokenizer.encode("\u2581\u2585\x00")) == "\u2581\u2585\x00"
    assert len(tokenizer.encode("rareword")) < 4


def test_chunks_of_long_characters_are_not_left_out(tmp_path: Path):
    """sentencepiece silently skips what it finds too long, in bytes."""
    text = _text(tmp_path, "\u6f22\u5b57\u304b\u306a" * 5000)
    tokenizer = _train([text], tmp_path / "t.model", 267)
    assert len(tokenizer.encode("\u6f22\u5b57\u304b\u306a")) < 4


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (5000, r"vocabulary size 5000 is too large for this text: at most \d+ pieces"),
        (200, r"vocabulary size 200 is too small: .* need \d+; raise it"),
    ],
)
def test_vocabulary_that_does_not_fit(tmp_path: Path, size: int, message: str):
    with pytest.raises(DataError, match=message):
        _train([_text(tmp_path)], tmp_path / "t.model", size)
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_no_text(tmp_path: Path):
    with pytest.raises(DataError, match="no text to train a tokenizer on"):
        _train([_text(tmp_path, "")], tmp_path / "t.model")


def test_sample_too_small(tmp_path: Path):
    with pytest.raises(DataError, match=r"max_bytes \(0\) leaves nothing of \d+ bytes"):
        _train([_text(tmp_path)], tmp_path / "t.model", max_bytes=0)
