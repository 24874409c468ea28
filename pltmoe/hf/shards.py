"""Writing safetensors shard by shard: at most one shard is in memory."""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from pltmoe.errors import ConversionError

INDEX = "model.safetensors.index.json"


class ShardWriter:
    """Collects tensors and writes ``model-00001-of-0000N.safetensors`` and the index.

    Sizes are known beforehand, so that every file gets its final name at once.

    Args:
        folder: where to write.
        sizes: name and bytes of every tensor, in the order in which they will be added.
        max_bytes: of one shard; a larger tensor gets a shard of its own.
    """

    def __init__(self, folder: Path, sizes: Iterable[tuple[str, int]], max_bytes: int):
        self._folder = folder
        self._shards = _plan(sizes, max_bytes)
        self._shard_of = {
            name: number for number, shard in enumerate(self._shards) for name in shard
        }
        self._open: dict[str, Tensor] = {}
        self._current, self._bytes = 0, 0

    @property
    def num_shards(self) -> int:
        """Number of files."""
        return len(self._shards)

    def add(self, name: str, tensor: Tensor) -> None:
        """Take the next tensor; writes a shard when it is complete.

        Raises:
            ConversionError: the shard cannot be written, e.g. to a full disk.
        """
        assert self._shard_of[name] == self._current, "tensors come in the planned order"
        self._open[name] = tensor.contiguous().clone()  # safetensors refuses views of one storage
        self._bytes += tensor.numel() * tensor.element_size()
        if len(self._open) == len(self._shards[self._current]):
            path = self._folder / self._file(self._current)
            try:
                save_file(self._open, path, {"format": "pt"})
            except SafetensorError as error:  # also what the file system refuses
                raise ConversionError(f"{path}: cannot be written ({error})") from error
            path.chmod(0o644)  # safetensors makes files that only their owner can read
            self._open, self._current = {}, self._current + 1

    def finish(self) -> None:
        """Write the index."""
        assert self._current == self.num_shards, "every planned tensor was added"
        index = {
            "metadata": {"total_size": self._bytes},
            "weight_map": {name: self._file(shard) for name, shard in self._shard_of.items()},
        }
        (self._folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")

    def _file(self, number: int) -> str:
        return f"model-{number + 1:05d}-of-{self.num_shards:05d}.safetensors"


def num_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Return the size of a tensor in bytes."""
    return torch.Size(shape).numel() * dtype.itemsize


def _plan(sizes: Iterable[tuple[str, int]], max_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = []
    room = 0
    for name, size in sizes:
        if not shards or size > room:
            shards.append([])
            room = max_bytes
        shards[-1].append(name)
        room -= size
    return shards
