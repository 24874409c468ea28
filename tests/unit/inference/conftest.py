"""One exported folder with a tokenizer, made once."""

from pathlib import Path

import pytest

from pltmoe.data.tokenizer_training import TrainingOptions, train_tokenizer
from tests.unit.hf.checkpoints import TEXT_VOCABULARY
from tests.unit.inference.folders import write_folder
from tests.unit.inference.models import model


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a small PLT-3 whose tokenizer has seen these tests."""
    folder = tmp_path_factory.mktemp("exported")
    tokenizer = folder / "tokenizer.model"
    (folder / "text").mkdir()
    for path in Path(__file__).parent.glob("*.py"):
        (folder / "text" / path.name).write_text(path.read_text())
    options = TrainingOptions(vocab_size=TEXT_VOCABULARY)
    train_tokenizer([folder / "text"], tokenizer, options, progress=False)
    output = folder / "hf"
    output.mkdir()
    m = model("plt3_normed").model_copy(update={"vocab_size": TEXT_VOCABULARY})
    write_folder(output, m, tokenizer)
    return output
