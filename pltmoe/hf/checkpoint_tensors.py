"""Single tensors out of a Megatron ``torch_dist`` checkpoint, without Megatron, model or ranks.

A checkpoint stores each tensor once, in chunks, whatever the layout that wrote it; experts of a
layer lie stacked along a leading axis. Only the chunks that are asked for are read, so a model of
any size can be converted with the memory of its largest tensor.
"""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from pltmoe.config import ModelConfig
from pltmoe.errors import CheckpointError, ConversionError
from pltmoe.hf.mapping import Row, rows

_LOCAL_EXPERTS, _STACKED_EXPERTS = ".mlp.experts.local_experts.{}.", ".mlp.experts.experts."
_UNREADABLE = (RuntimeError, OSError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile)


class CheckpointTensors:
    """The model tensors of one checkpoint folder, read one at a time.

    Raises:
        CheckpointError: the folder holds no readable ``torch_dist`` checkpoint.
        ConversionError: the tensors in it are not those of ``model``.
    """

    def __init__(self, folder: Path, model: ModelConfig):
        self.folder = folder
        self._reader = FileSystemReader(folder)
        try:
            self._metadata: Metadata = self._reader.read_metadata()
        except (*_UNREADABLE, AttributeError, ImportError) as error:
            raise CheckpointError(f"{folder}: no readable torch_dist checkpoint: {error}") from None
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        self._check(model)

    def read(self, row: Row) -> Tensor:
        """Return one whole Megatron tensor, in the dtype it is stored in.

        Raises:
            CheckpointError: its file is damaged.
        """
        key = stored_key(row)
        stored = self._metadata.state_dict_metadata[key]
        stacked = () if row.expert is None else (1,)
        offsets = (*(row.expert or 0 for _ in stacked), *(0 for _ in row.megatron_shape))
        target = torch.empty((*stacked, *row.megatron_shape), dtype=stored.properties.dtype)
        planner = _SlicePlanner(key, stored, offsets, target)
        try:
            self._reader.read_data(planner.create_local_plan(), planner).wait()
        except _UNREADABLE as error:
            raise CheckpointError(f"{self.folder}: {key} cannot be read: {error}") from None
        return target.view(row.megatron_shape)

    def dtype(self) -> torch.dtype:
        """Return the dtype of the weights."""
        return self._metadata.state_dict_metadata[
            "model.embedding.word_embeddings.weight"
        ].properties.dtype

    def _check(self, model: ModelConfig) -> None:
        """Compare names and shapes of everything with the table, before anything is written."""
        stored = {
            key: tuple(entry.size)
            for key, entry in self._metadata.state_dict_metadata.items()
            if key.startswith("model.") and isinstance(entry, TensorStorageMetadata)
        }
        wanted = {}
        for row in rows(model):
            stacked = () if row.expert is None else (model.num_experts,)
            wanted[stored_key(row)] = (*stacked, *row.megatron_shape)
        for key in wanted.keys() - stored.keys():
            raise ConversionError(f"{self.folder}: tensor missing: {key}")
        for key in stored.keys() - wanted.keys():
            raise ConversionError(
                f"{self.folder}: tensor {key} is unknown to the model configuration in its manifest"
            )
        for key, shape in wanted.items():
            if stored[key] != shape:
                raise ConversionError(
                    f"{self.folder}: {key} has shape {list(stored[key])}, but the model "
                    f"configuration says {list(shape)}"
                )


def stored_key(row: Row) -> str:
    """Return the key of a tensor in a checkpoint; all experts of a layer share one."""
    name = row.megatron
    if row.expert is not None:
        name = name.replace(_LOCAL_EXPERTS.format(row.expert), _STACKED_EXPERTS)
    return "model." + name


class _SlicePlanner(LoadPlanner):
    """Asks PyTorch's reader for one block of one stored tensor."""

    def __init__(
        self, key: str, stored: TensorStorageMetadata, offsets: tuple[int, ...], target: Tensor
    ):
        self._key, self._stored, self._target = key, stored, target
        self._chunk = ChunkStorageMetadata(torch.Size(offsets), target.shape)

    def set_up_planner(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: the plan is for one process."""

    def create_local_plan(self) -> LoadPlan:
        """Return the reads that make up the block."""
        return LoadPlan(create_read_items_for_chunk_list(self._key, self._stored, [self._chunk]))

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        """Return the plans unchanged."""
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        """Return the plan unchanged."""
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        """Never asked for: only tensors are read."""
        raise AssertionError(read_item)

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """Return the part of the target that one read fills."""
        part = self._target
        for dim, (start, length) in enumerate(
            zip(read_item.dest_offsets, read_item.lengths, strict=True)
        ):
            part = part.narrow(dim, start, length)
        return part

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Nothing to do: the reader has copied into the target."""
