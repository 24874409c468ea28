"""Datasets with known tokens, for tests."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pltmoe.config import RunConfig, config_from_dict
from pltmoe.data.indexed import bin_path, idx_path, write_index
from pltmoe.data.tokenizer import Tokenizer


def write_dataset(
    prefix: Path, documents: Sequence[np.ndarray], dtype: np.dtype | None = None
) -> Path:
    """Write documents of token ids as a dataset without a manifest."""
    dtype = dtype or np.dtype(np.uint16)
    flat = np.concatenate([np.array([], dtype), *documents]).astype(dtype)
    bin_path(prefix).write_bytes(flat.tobytes())
    write_index(idx_path(prefix), np.array([len(d) for d in documents], np.int64), dtype)
    return prefix


def run_config(
    tokenizer: Tokenizer,
    train: Any,
    *,
    sequence_length: int,
    seed: int = 1,
    vocab_size: int = 600,
    **data: Any,
) -> RunConfig:
    """Return a run of a tiny model on ``train``, a prefix or a list of sources."""
    sources = train if isinstance(train, list) else [{"path": train}]
    return config_from_dict(
        {
            "name": "data",
            "model": {
                "vocab_size": vocab_size,
                "num_layers": 1,
                "hidden_size": 8,
                "num_attention_heads": 1,
                "num_kv_heads": 1,
                "head_dim": 8,
                "ffn_hidden_size": 8,
            },
            "data": {
                "tokenizer": tokenizer.model_path,
                "train": sources,
                "sequence_length": sequence_length,
                **data,
            },
            "optimizer": {"lr": 1e-3},
            "train": {"output_dir": "runs/x", "steps": 1, "global_batch_size": 1, "seed": seed},
        }
    )
