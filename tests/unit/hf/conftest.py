"""A run with a checkpoint, once."""

from pathlib import Path

import pytest

from pltmoe.hf.convert import Export, ExportOptions, export_checkpoint
from tests.unit.hf.checkpoints import model_of, write_checkpoint


@pytest.fixture(scope="session")
def plt_run(tmp_path_factory: pytest.TempPathFactory, tokenizer_model: Path) -> Path:
    """A run of PLT-2 with everything that can be in a checkpoint: window, gate, expert bias."""
    run = tmp_path_factory.mktemp("plt") / "run"
    write_checkpoint(run, model_of("plt2_expert_bias"), tokenizer_model)
    return run


@pytest.fixture(scope="session")
def plt_export(plt_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Export:
    """That run, exported in several shards."""
    folder = tmp_path_factory.mktemp("export") / "hf"
    return export_checkpoint(plt_run, folder, ExportOptions(progress=False, max_shard_bytes=30_000))
