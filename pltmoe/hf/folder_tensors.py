"""What is in a Hugging Face folder: JSON, and tensors by name, read one at a time."""

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pltmoe.errors import ConversionError
from pltmoe.hf.mapping import Row
from pltmoe.hf.shards import INDEX

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_NUMBERS = ("F64", "F32", "F16", "BF16")


class FolderTensors:
    """Opens every safetensors file of ``folder``; ``stack`` closes them.

    Raises:
        ConversionError: no safetensors files, unreadable ones, a tensor that two of them hold, or
            one of another type than float16, bfloat16, float32 and float64.
    """

    def __init__(self, folder: Path, stack: ExitStack):
        self._folder = folder
        self._file_of: dict[str, Any] = {}
        for path in _safetensors_files(folder):
            try:
                opened = stack.enter_context(safe_open(path, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise ConversionError(f"{path}: cannot be read ({error})") from None
            if twice := sorted(self._file_of.keys() & set(opened.keys())):
                raise ConversionError(f"{path}: {twice[0]} is in another file of the folder, too")
            self._file_of |= dict.fromkeys(opened.keys(), opened)
        for name in self._file_of:
            if (kind := self.dtype(name)) not in _NUMBERS:
                raise ConversionError(
                    f"{folder}: {name} is {kind}; only {', '.join(_NUMBERS)} can be converted "
                    "(quantised weights cannot)"
                )

    def names(self, tied_head: bool) -> list[str]:
        """Return all names; without the head if it is the embedding, which some files repeat.

        Raises:
            ConversionError: it is said to be the embedding, and is not.
        """
        if not (tied_head and self._file_of.keys() >= {_HEAD, _EMBEDDING}):
            return list(self._file_of)
        head, embedding = self.tensor(_HEAD), self.tensor(_EMBEDDING)
        if head.dtype != embedding.dtype or not torch.equal(head, embedding):
            raise ConversionError(
                f"{self._folder}: {_HEAD} is not {_EMBEDDING}, but tie_word_embeddings is true in "
                "config.json: set it to false, or delete the tensor that is not meant"
            )
        return [name for name in self._file_of if name != _HEAD]

    def dtype(self, name: str) -> str:
        """Return the type of one tensor in safetensors' words, e.g. ``BF16``."""
        return self._file_of[name].get_slice(name).get_dtype()

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of one tensor, without reading it."""
        return tuple(self._file_of[name].get_slice(name).get_shape())

    def tensor(self, name: str) -> Tensor:
        """Return one tensor as it is stored."""
        return self._file_of[name].get_tensor(name)

    def read(self, row: Row) -> Tensor:
        """Return one Megatron tensor, put together."""
        return row.join({name: self.tensor(name) for name in row.hf})


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file, e.g. ``config.json``.

    Raises:
        ConversionError: it cannot be read, or holds something else.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConversionError(f"{path}: cannot be read ({error})") from None
    if not isinstance(tree, dict):
        raise ConversionError(f"{path}: cannot be read (not a JSON object: {str(tree)[:50]})")
    return tree


def _safetensors_files(folder: Path) -> list[Path]:
    """Look for one file first, as transformers does."""
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    index = folder / INDEX
    if index.is_file():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(n, str) for n in names.values()):
            raise ConversionError(f"{index}: not a safetensors index (no weight_map)")
        return [folder / name for name in sorted(set(names.values()))]
    raise ConversionError(f"{folder}: neither {INDEX} nor model.safetensors")
