"""A tokenizer trained on a little text, and a run that used it, once."""

from pathlib import Path

import pytest

from pltmoe.data.tokenizer_training import TrainingOptions, train_tokenizer
from tests.unit.hf.checkpoints import TEXT_VOCABULARY, model_of, write_checkpoint


@pytest.fixture(scope="session")
def tokenizer_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a sentencepiece model of the training tool's kind."""
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "text").mkdir()
    for name in ("modeling.py", "generation.py", "mapping.py"):
        source = Path(__file__).with_name(f"test_{name}")
        (folder / "text" / name).write_text(source.read_text())
    output = folder / "tokenizer.model"
    train_tokenizer(
        [folder / "text"], output, TrainingOptions(vocab_size=TEXT_VOCABULARY), progress=False
    )
    return output


@pytest.fixture(scope="session")
def plt_run(tmp_path_factory: pytest.TempPathFactory, tokenizer_model: Path) -> Path:
    """A run of PLT-2 with everything that can be in a checkpoint: window, gate, expert bias."""
    run = tmp_path_factory.mktemp("plt") / "run"
    write_checkpoint(run, model_of("plt2_expert_bias"), tokenizer_model)
    return run
