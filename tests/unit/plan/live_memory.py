"""Which memory is really alive: every storage that an operation has made and nothing has freed."""

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

_EVERY = 8
"""Operations between two looks; each costs as many steps as there are storages."""


class LiveMemory(TorchDispatchMode):
    """Follows the storages of all results while it is entered.

    Better than autograd's saved-tensor hooks: what a checkpointed layer or a later loop holds in
    Python is counted as well.
    """

    def __init__(self, known: list[torch.Tensor], watch: bool = False):
        """``known`` (weights) does not count; with ``watch``, ``most`` is that of all moments."""
        super().__init__()
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}
        self._watch, self._calls, self.most = watch, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self._follow(tensor.untyped_storage())
        self._calls += 1
        if self._watch and self._calls % _EVERY == 0:
            self.most = max(self.most, self.alive())
        return out

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known or (key in self._made and not self._made[key][0].expired()):
            return
        self._made[key] = (StorageWeakRef(storage), storage.nbytes())

    def alive(self) -> int:
        """Return the bytes that are alive now."""
        return sum(size for reference, size in self._made.values() if not reference.expired())
