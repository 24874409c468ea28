"""What each rank does in test_data.py."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from pltmoe.data.datasets import batches, build_datasets
from pltmoe.data.tokenizer import load_tokenizer
from pltmoe.errors import DataError
from tests.unit.data.datasets import run_config


def read(model: Path, train: Any, samples: tuple[int, int, int], **data: Any) -> dict[str, Any]:
    """Build datasets on every rank; return what this rank would train on, or its error."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    tokenizer = load_tokenizer(model)
    config = run_config(tokenizer, train, **data)
    try:
        sets = build_datasets(config, tokenizer, samples)
    except DataError as error:
        return {"error": str(error)}
    finally:
        dist.barrier()
    found = batches(
        sets[0],
        consumed_samples=0,
        micro_batch_size=1,
        dp_rank=dist.get_rank(),
        dp_size=dist.get_world_size(),
    )
    return {
        "tokens": torch.cat([batch["tokens"] for batch in found]).tolist(),
        "valid": None if sets[1] is None else len(sets[1]),
        "from_cache": [isinstance(index, np.memmap) for index in _indices(sets[0])],
    }


def _indices(dataset: Any) -> list[Any]:
    single = getattr(dataset, "datasets", [dataset])
    return [index for part in single for index in (part.shuffle_index, part.document_index)]
