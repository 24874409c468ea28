"""Real checkpoints (Megatron model, the trainer's own save) with random weights, for conversion."""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from pltmoe.checkpoint.manifest import Manifest
from pltmoe.checkpoint.store import begin_save
from pltmoe.config import ModelConfig, RunConfig
from pltmoe.engines.sharded_state import model_state
from pltmoe.hf.checkpoint_tensors import CheckpointTensors
from pltmoe.hf.convert_back import import_folder
from pltmoe.hf.mapping import rows
from pltmoe.model.megatron_config import transformer_config
from pltmoe.model.plt import PLTModel
from pltmoe.parallel.groups import create_groups, destroy_groups
from pltmoe.parallel.layout import layout_for
from pltmoe.runtime import distributed
from pltmoe.runtime.tokenizer_files import read_tokenizer
from tests import configs
from tests.unit.hf.models import small_model

TEXT_VOCABULARY = 400


def model_of(name: str, **changes: Any) -> ModelConfig:
    """Return a small model with the vocabulary of the tokenizer of these tests."""
    return small_model(name, vocab_size=TEXT_VOCABULARY, **changes)


def run_config(m: ModelConfig) -> RunConfig:
    """Return a run that could have written a checkpoint of ``m``."""
    return configs.run_config(model=m.model_dump())


def write_checkpoint(
    run: Path, m: ModelConfig, tokenizer: Path, dtype: torch.dtype = torch.float32
) -> Path:
    """Write ``run/checkpoints/step_00000007`` and return it; ``run/logits.pt`` is what the
    Megatron model itself computed.
    """
    config = run_config(m)
    distributed.start(distributed.Processes(rank=0, world_size=1, local_rank=0))
    groups = create_groups(layout_for(config, 1))
    try:
        transformer = transformer_config(m, params_dtype=dtype)
        model = PLTModel(m, transformer, groups)
        torch.manual_seed(3)
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_floating_point():
                centre = 1.0 if "norm" in name else 0.0
                tensor.data.normal_(centre, 0.3)
        manifest = Manifest(config=config, step=7, tokens=7 * 32)
        folder = run / "checkpoints"
        folder.mkdir(parents=True)
        tokens = torch.randint(0, m.vocab_size, (2, 24))
        with torch.no_grad():
            torch.save({"tokens": tokens, "logits": model.eval()(tokens)}, run / "logits.pt")
        files = read_tokenizer(tokenizer)
        return begin_save(folder, model_state(model, groups), manifest, files).finish()
    finally:
        destroy_groups()
        distributed.stop()


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of an exported folder."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def check_round_trip(checkpoint: Path, folder: Path, output: Path, m: ModelConfig) -> None:
    """Import an exported folder and compare it with its checkpoint, bit for bit."""
    import_folder(folder, output, run_config(m), progress=False)
    before, after = CheckpointTensors(checkpoint, m), CheckpointTensors(output, m)
    for row in rows(m):
        a, b = before.read(row), after.read(row)
        assert a.dtype == b.dtype and torch.equal(a, b), row.megatron
    assert (output / "tokenizer.model").read_bytes() == (
        checkpoint / "tokenizer.model"
    ).read_bytes()
