"""One small corpus and tokenizer for all tests of data."""

import json
from pathlib import Path

import pytest

from pltmoe.data.corpus import build_corpus
from pltmoe.data.tokenizer import Tokenizer
from pltmoe.data.tokenizer_training import TrainingOptions, train_tokenizer


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 5 MB of Python's standard library as JSONL."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    build_corpus(path, max_bytes=5_000_000, progress=False)
    return path


@pytest.fixture(scope="session")
def tokenizer(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    options = TrainingOptions(vocab_size=600, max_bytes=200_000)
    return train_tokenizer([corpus], path, options, progress=False)


@pytest.fixture
def documents() -> list[str]:
    return [f"document {i}\n" + f"word{i} " * (i % 7) for i in range(40)]


@pytest.fixture
def jsonl(tmp_path: Path, documents: list[str]) -> Path:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


@pytest.fixture
def counting(tmp_path: Path) -> Path:
    """A dataset whose tokens count."""
    from tests.unit.data.datasets import counting_documents, write_dataset  # imports Megatron

    return write_dataset(tmp_path / "counting", counting_documents())
