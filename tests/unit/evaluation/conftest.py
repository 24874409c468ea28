"""Exported models with random weights, one with loops and one that transformers knows itself."""

import json
from pathlib import Path

import pytest
import torch

from pltmoe.hf.convert import ExportOptions, export_checkpoint
from tests.unit.hf.checkpoints import TEXT_VOCABULARY, write_checkpoint
from tests.unit.hf.models import small_model

SLOTS = 2048


@pytest.fixture(scope="session")
def exports(tmp_path_factory, tokenizer_model) -> dict[str, Path]:
    """PLT-2 (custom code, fp32) and vanilla (stock Qwen3-MoE, bf16), as folders."""
    found = {}
    for name, dtype in (("plt2", torch.float32), ("vanilla", torch.bfloat16)):
        run = tmp_path_factory.mktemp(name) / "run"
        model = small_model(name, vocab_size=TEXT_VOCABULARY)
        write_checkpoint(run, model, tokenizer_model)
        folder = run.parent / "hf"
        export_checkpoint(run, folder, ExportOptions(dtype=dtype, progress=False, verify=False))
        config = json.loads((folder / "config.json").read_text())
        config["max_position_embeddings"] = SLOTS  # so that a document is one window
        (folder / "config.json").write_text(json.dumps(config))
        found[name] = folder
    return found
