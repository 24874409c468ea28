"""Hugging Face folder -> checkpoint, for training from its weights; the inverse of convert.py.

The checkpoint holds the model only (no optimizer, step 0): start a run from it with
``checkpoint.load_weights``. Bit for bit the same tensors when the dtype is kept.
"""

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from torch import Tensor
from tqdm import tqdm

from pltmoe.checkpoint.manifest import Manifest
from pltmoe.checkpoint.store import write_folder
from pltmoe.config import ModelConfig, RunConfig
from pltmoe.errors import ConversionError
from pltmoe.hf.checkpoint_tensors import stored_key
from pltmoe.hf.fields import from_hf_fields
from pltmoe.hf.folder_tensors import FolderTensors, read_json
from pltmoe.hf.mapping import Row, check_names, rows
from pltmoe.runtime import distributed
from pltmoe.runtime.tokenizer_files import find_tokenizer, read_tokenizer

_TRAINING_ONLY = {"init_std", "moe_aux_loss_coeff", "moe_z_loss_coeff"}
_LINEAR = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2", "output_layer")


def import_folder(
    folder: Path,
    output: Path,
    config: RunConfig,
    dtype: torch.dtype | None = None,
    progress: bool = True,
) -> ModelConfig:
    """Write the weights of ``folder`` as a checkpoint folder ``output``.

    Args:
        folder: ``plt_moe``, Qwen3-MoE or Qwen3 model.
        output: must not exist, or be empty.
        config: of the run that will use it; its model section must describe ``folder``.
        dtype: of the stored weights; default: as in ``folder``.
        progress: show a progress bar.

    Raises:
        ConversionError: the folder cannot be converted, or does not fit ``config``.
        CheckpointError: ``output`` cannot be written.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConversionError(f"{output}: exists and is not empty; name another folder")
    model = _read_model(folder, config)
    with ExitStack() as stack:
        tensors = FolderTensors(folder, stack)
        table = list(rows(model))
        names = tensors.names(tied_head=model.tied_embeddings)
        check_names(f"{folder}: Hugging Face", names, [name for row in table for name in row.hf])
        if dtype is None:
            _check_one_dtype(folder, tensors, table)
        state: dict[str, Any] = {}
        for row in tqdm(table, desc="weights", disable=not progress):
            tensor = tensors.read(row)
            state |= _stored(row, tensor.to(_stored_dtype(row, tensor, dtype)), model)
    manifest = Manifest(config=config, contains=("model",), precision=_precision(state))
    alone = distributed.Processes(rank=0, world_size=1, local_rank=0)
    distributed.start(alone)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        found = find_tokenizer(folder)
        write_folder(output, state, manifest, read_tokenizer(found) if found else None)
    finally:
        distributed.stop()
    return model


def _read_model(folder: Path, config: RunConfig) -> ModelConfig:
    path = folder / "config.json"
    found, wanted = from_hf_fields(read_json(path), str(path)), config.model
    if differ := _differences(found, wanted):
        words = [f"{name}: folder {a}, config {b}" for name, (a, b) in differ.items()]
        more = ""
        if found.num_loops == 1 and wanted.num_loops > 1:
            overrides = " ".join(f"{name}={json.dumps(a)}" for name, (a, _) in differ.items())
            more = f". Convert it with {overrides}: a run with loops may start from that"
        raise ConversionError(
            f"{path} does not fit the model section of the configuration: {'; '.join(words)}{more}"
        )
    return wanted


def _differences(found: ModelConfig, wanted: ModelConfig) -> dict[str, tuple[Any, Any]]:
    """Compare what the model computes; what only training uses is free."""
    ignored = set(_TRAINING_ONLY)
    if not (found.gated_swa and wanted.gated_swa):
        ignored.add("window_keys")
    differ = {}
    for name in ModelConfig.model_fields:
        a, b = getattr(found, name), getattr(wanted, name)
        if name == "moe_expert_bias_update_rate":
            a, b = a > 0, b > 0
        if name not in ignored and a != b:
            differ[f"model.{name}"] = (a, b)
    return differ


def _check_one_dtype(folder: Path, tensors: FolderTensors, table: list[Row]) -> None:
    first: dict[str, str] = {}
    for name in (name for row in table if not row.float32 for name in row.hf):
        first.setdefault(tensors.dtype(name), name)
    if len(first) > 1:
        found = ", ".join(f"{name} is {dtype}" for dtype, name in first.items())
        raise ConversionError(f"{folder}: {found}; a checkpoint has one type: choose with --dtype")


def _stored_dtype(row: Row, tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    return torch.float32 if row.float32 else dtype or tensor.dtype


def _precision(state: dict[str, Any]) -> str:
    dtype = state["model.embedding.word_embeddings.weight"].data.dtype
    return "bf16" if dtype == torch.bfloat16 else "fp32"


def _stored(row: Row, tensor: Tensor, model: ModelConfig) -> dict[str, Any]:
    """Describe one tensor as PLTModel.sharded_state_dict does on a single process.

    Experts are stacked along a leading axis, gate and up are stored as two halves, and a linear
    layer has an (empty) extra state.
    """
    key, name = stored_key(row), "model." + row.megatron
    experts = () if row.expert is None else ((0, row.expert, model.num_experts),)
    halves = tensor.chunk(2) if row.layout == "gate_up" else (tensor,)
    state: dict[str, Any] = {}
    for number, half in enumerate(halves):
        axis = (len(experts), number, len(halves))
        state[name if len(halves) == 1 else f"{name}.{number}"] = ShardedTensor.from_rank_offsets(
            key, half.contiguous(), *experts, axis, prepend_axis_num=len(experts)
        )
    module = key.removesuffix(".weight")
    if module.endswith(_LINEAR) and key.endswith(".weight"):
        shape, offset = (
            ((1,), (0,)) if row.expert is None else ((model.num_experts,), (row.expert,))
        )
        extra = f"{module}._extra_state"
        state[f"{name}._extra_state"] = ShardedObject(extra, None, shape, offset)
    return state
