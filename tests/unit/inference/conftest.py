"""One exported folder with a tokenizer, made once."""

from pathlib import Path

import pytest

from tests.unit.hf.checkpoints import TEXT_VOCABULARY
from tests.unit.inference.folders import write_folder
from tests.unit.inference.models import model


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory, tokenizer_model: Path) -> Path:
    """Return a folder with a small PLT-3."""
    output = tmp_path_factory.mktemp("exported")
    m = model("plt3_normed").model_copy(update={"vocab_size": TEXT_VOCABULARY})
    write_folder(output, m, tokenizer_model)
    return output
