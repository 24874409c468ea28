"""Whole state dicts: through the name table, which the package takes row by row, and from disk."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from pltmoe.config import ModelConfig
from pltmoe.hf.mapping import check_names, rows


def megatron_to_hf(
    name_to_tensor: Mapping[str, Tensor], model: ModelConfig, partial: bool = False
) -> dict[str, Tensor]:
    """Rename and unfuse a full (unsharded) Megatron state dict, or its gradients.

    Args:
        name_to_tensor: names as in ``PLTModel``, without prefix; experts as local_experts.{j}.
        model: the model section that the tensors belong to.
        partial: let tensors be missing (gradients: an expert that saw no token has none).

    Raises:
        ConversionError: unknown or (unless ``partial``) missing tensor, or a wrong shape.
    """
    table = {row.megatron: row for row in rows(model)}
    check_names("Megatron", name_to_tensor, table, partial)
    out: dict[str, Tensor] = {}
    for name, row in table.items():
        if name in name_to_tensor:
            out |= row.split(name_to_tensor[name])
    return out


def hf_to_megatron(
    name_to_tensor: Mapping[str, Tensor], model: ModelConfig, partial: bool = False
) -> dict[str, Tensor]:
    """Fuse and rename a full Hugging Face (or reference) state dict, or its gradients.

    The arguments and errors are those of :func:`megatron_to_hf`; with ``partial`` a fused tensor
    may be missing as a whole, not in part. ``lm_head.weight`` of a tied model is dropped: it is
    the embedding.
    """
    table = list(rows(model))
    given = dict(name_to_tensor)
    if model.tied_embeddings:
        given.pop("lm_head.weight", None)
    check_names("Hugging Face", given, [name for row in table for name in row.hf], partial)
    present = [row for row in table if any(name in given for name in row.hf)]
    return {row.megatron: row.join(given) for row in present}


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint, whole, read with PyTorch's own reader."""
    reader = FileSystemReader(folder)
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    load(tensors, storage_reader=reader, no_dist=True)
    return tensors
