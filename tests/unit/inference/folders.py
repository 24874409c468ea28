"""Exported folders, laid out as tools/convert_to_hf.py does it, with random weights."""

import json
import shutil
from pathlib import Path

import torch
from transformers import AutoTokenizer

from pltmoe.config import ModelConfig
from pltmoe.hf import configuration_plt_moe, modeling_plt_moe
from pltmoe.hf.fast_tokenizer import write_tokenizer
from pltmoe.hf.fields import to_hf_fields
from pltmoe.hf.shards import ShardWriter, num_bytes
from pltmoe.model.reference import ReferencePLT
from tests.unit.hf.models import random_reference

MAX_SLOTS = 96


def write_folder(
    folder: Path, m: ModelConfig, tokenizer: Path | None = None, stop_id: int | None = None
) -> ReferencePLT:
    """Write a float32 folder in several shards; return the model that is in it.

    With a tokenizer the model hardly ever says a single byte: bytes that are no characters read
    differently one by one and together.
    """
    reference = random_reference(m, dtype=torch.float32)
    state = reference.state_dict()
    if tokenizer is not None:
        write_tokenizer(tokenizer, folder, MAX_SLOTS)
        names = AutoTokenizer.from_pretrained(folder).get_vocab()
        bytes_or_special = [i for name, i in names.items() if name.startswith("<")]
        state["lm_head.weight"][bytes_or_special] = 0.0
    if m.tied_embeddings:
        del state["lm_head.weight"]
    sizes = [(name, num_bytes(tuple(x.shape), x.dtype)) for name, x in state.items()]
    writer = ShardWriter(folder, sizes, max_bytes=30_000)
    for name, tensor in state.items():
        writer.add(name, tensor)
    writer.finish()
    fields = to_hf_fields(m, MAX_SLOTS) | {"dtype": "float32", "eos_token_id": stop_id}
    (folder / "config.json").write_text(json.dumps(fields))
    for module in (configuration_plt_moe, modeling_plt_moe):
        shutil.copy(str(module.__file__), folder)
    return reference
