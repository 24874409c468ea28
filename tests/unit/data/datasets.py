"""Datasets with known tokens, for tests."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pltmoe.config import RunConfig
from pltmoe.data.datasets import batches
from pltmoe.data.indexed import bin_path, idx_path, write_index
from pltmoe.data.tokenizer import Tokenizer
from tests import configs

SEQUENCE = 16


def write_dataset(
    prefix: Path, documents: Sequence[np.ndarray], dtype: np.dtype | None = None
) -> Path:
    """Write documents of token ids as a dataset without a manifest."""
    dtype = dtype or np.dtype(np.uint16)
    flat = np.concatenate([np.array([], dtype), *documents]).astype(dtype)
    bin_path(prefix).write_bytes(flat.tobytes())
    write_index(idx_path(prefix), np.array([len(d) for d in documents], np.int64), dtype)
    return prefix


def counting_documents(documents: int = 40, length: int = 50) -> list[np.ndarray]:
    """Documents whose tokens count up from 10, through all documents, modulo 500; eod at ends."""
    stream = 10 + np.arange(documents * length) % 500
    return [np.append(part, 2) for part in stream.reshape(documents, length)]


def run_config(
    tokenizer: Tokenizer, train: Any, *, vocab_size: int = 600, seed: int = 1, **data: Any
) -> RunConfig:
    """Return a run of a tiny model on ``train``, a prefix or a list of sources; 16 tokens each."""
    return configs.run_config(
        model=configs.DENSE | {"vocab_size": vocab_size},
        data={
            "sequence_length": SEQUENCE,
            "tokenizer": tokenizer.model_path,
            "train": train,
            **data,
        },
        train__seed=seed,
    )


class Numbers(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Sequences that are their own index."""

    def __init__(self, size: int):
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        keys = ("tokens", "labels", "loss_mask", "position_ids")
        return dict.fromkeys(keys, torch.tensor([index]))


def all_batches(dataset: Any, **where: Any) -> list[dict[str, torch.Tensor]]:
    """Return the batches of one rank."""
    chosen = {"consumed_samples": 0, "micro_batch_size": 2, "dp_rank": 0, "dp_size": 1, **where}
    return list(batches(dataset, **chosen))


def tokens_of(found: list[dict[str, torch.Tensor]]) -> list[list[int]]:
    """Return the sequences of batches."""
    return [row.tolist() for batch in found for row in batch["tokens"]]
