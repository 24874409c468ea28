"""What the tests of several parts share: a tokenizer, and a gate for what is being saved."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def tokenizer_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a sentencepiece model of the training tool's kind, which has seen source code."""
    from pltmoe.data.tokenizer_training import TrainingOptions, train_tokenizer
    from tests.unit.hf.checkpoints import TEXT_VOCABULARY

    text = [Path(__file__).with_name("hf") / f"test_{name}.py" for name in ("mapping", "modeling")]
    text.append(text[0].with_name("test_generation.py"))
    output = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(text, output, TrainingOptions(vocab_size=TEXT_VOCABULARY), progress=False)
    return output


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Files of a checkpoint are written when this is set; ``gate.error`` is what they then meet."""
    from pltmoe.checkpoint import in_process

    gate, write = threading.Event(), in_process._write_file
    gate.error = None  # type: ignore[attr-defined]

    def slow(*args: Any, **kwargs: Any) -> Any:
        assert gate.wait(60)
        return (0, gate.error) if gate.error else write(*args, **kwargs)  # type: ignore[attr-defined]

    monkeypatch.setattr(in_process, "_write_file", slow)
    yield gate
    gate.set()
