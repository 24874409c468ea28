"""The tensors of a Hugging Face folder by name, read one at a time."""

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from pltmoe.errors import ConversionError
from pltmoe.hf.mapping import Row
from pltmoe.hf.shards import INDEX


class FolderTensors:
    """Opens every safetensors file of ``folder``; ``stack`` closes them.

    Raises:
        ConversionError: no safetensors files, or unreadable ones.
    """

    def __init__(self, folder: Path, stack: ExitStack):
        self._file_of: dict[str, Any] = {}
        for path in _safetensors_files(folder):
            try:
                opened = stack.enter_context(safe_open(path, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise ConversionError(f"{path}: cannot be read ({error})") from None
            self._file_of |= dict.fromkeys(opened.keys(), opened)

    def names(self) -> list[str]:
        """Return all names."""
        return list(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of one tensor, without reading it."""
        return tuple(self._file_of[name].get_slice(name).get_shape())

    def tensor(self, name: str) -> Tensor:
        """Return one tensor as it is stored."""
        return self._file_of[name].get_tensor(name)

    def read(self, row: Row) -> Tensor:
        """Return one Megatron tensor, put together."""
        return row.join({name: self.tensor(name) for name in row.hf})


def _safetensors_files(folder: Path) -> list[Path]:
    index = folder / INDEX
    if index.is_file():
        try:
            names = set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, KeyError) as error:
            raise ConversionError(f"{index}: not a safetensors index ({error})") from None
        return [folder / name for name in sorted(names)]
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    raise ConversionError(f"{folder}: neither {INDEX} nor model.safetensors")
