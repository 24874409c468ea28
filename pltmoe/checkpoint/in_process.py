"""Keeps Megatron's writing of tensors inside this process, and lets it go on while training does.

Its file writer is made for another process and sends what it wrote through a queue of a manager
process. Starting that one means another interpreter that imports the entry script: ten seconds and
half a gigabyte on every rank, and it outlives a killed job. Writing to a file needs neither
collectives nor, most of the time, Python's lock: a thread does it. Here, and nowhere else, is known
what Megatron's writer looks like inside.
"""

import inspect
import queue
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch import Tensor

# Megatron wraps it so that the garbage collector of the whole process stands still meanwhile.
_write_file = inspect.unwrap(filesystem_async.FileSystemWriterAsync.write_preloaded_data)


class AbandonedError(Exception):
    """Writing was given up: the run is ending with an error."""


class ShardWriter:
    """This rank's files of one checkpoint: planned by all ranks, then written by each alone.

    Args:
        folder: an empty folder.
        state: sharded state dict of this rank.
        copy: take a copy in host memory now, so that the state may change while it is written.
    """

    def __init__(self, folder: Path, state: dict[str, Any], copy: bool):
        self._folder, self._abandoned = folder, threading.Event()
        strategy = _Strategy()
        filesystem_async._results_queue = queue.Queue()  # asked for, never used
        request = dist_checkpointing.save(
            state,
            str(folder),
            strategy,
            validate_access_integrity=True,
            async_sharded_save=True,
            async_strategy="mcore",
        )
        self._writer, self._metadata = strategy.planned
        self._transforms = request.async_fn.args[0] if request.async_fn else []
        self._buckets, self._writer.write_buckets = self._writer.write_buckets, None
        self.files = [Path(bucket[0]) for bucket in self._buckets]
        """What ``write`` writes."""
        if copy:
            _copy_to_host_memory(self._buckets, state)

    def write(self) -> list[Any]:
        """Write this rank's files and return what ``complete`` has to know of them.

        Raises:
            Exception: whatever went wrong.
        """
        buckets, self._buckets = self._buckets, []
        results = []
        for path, key, (objects, tensors) in buckets:
            bucket = (path, key, (objects, self._one_by_one(tensors)))
            outcome = _write_file(self._transforms, 0, bucket, None, None, use_fsync=True)[1]
            if isinstance(outcome, Exception):
                raise outcome
            results += outcome
        return results

    def complete(self, results: list[list[Any]]) -> None:
        """Write the index of all ranks' files; rank 0 calls it."""
        self._writer.finish(self._metadata, results)
        save_config(CheckpointingConfig("torch_dist", 1), str(self._folder))

    def abandon(self) -> None:
        """Let ``write`` fail before the next tensor."""
        self._abandoned.set()

    def _one_by_one(self, tensors: list[tuple[Any, Tensor]]) -> Iterator[tuple[Any, Tensor]]:
        """Yield tensors in host memory and let go of each, so that memory shrinks on the way."""
        while tensors:
            if self._abandoned.is_set():
                raise AbandonedError("the run ended")
            item, tensor = tensors.pop(0)
            yield item, tensor.cpu()


class _Strategy(TorchDistSaveShardedStrategy):
    """Megatron's planning; gives access to the writer and, on rank 0, the index it made."""

    planned: tuple[Any, Any]

    def _get_save_and_finalize_callbacks(
        self, writer: Any, save_state_dict_ret: Any, async_strategy: str
    ) -> Any:
        self.planned = (writer, save_state_dict_ret[1])
        return super()._get_save_and_finalize_callbacks(writer, save_state_dict_ret, async_strategy)


def _copy_to_host_memory(buckets: list[Any], state: dict[str, Any]) -> None:
    """Put copies in the place of tensors that are still those of ``state``, one after the other.

    Of views in host memory, such as all optimizer state, Megatron's planning has made copies.
    """
    storages = {_storage(v.data) for v in nested_values(state) if isinstance(v.data, Tensor)}
    for _, _, (_, tensors) in buckets:
        for place, (item, tensor) in enumerate(tensors):
            if not tensor.is_cpu or _storage(tensor) in storages:
                tensors[place] = item, torch.empty_like(tensor, device="cpu").copy_(tensor)


def _storage(tensor: Tensor) -> tuple[torch.device, int]:
    return tensor.device, tensor.untyped_storage().data_ptr()
