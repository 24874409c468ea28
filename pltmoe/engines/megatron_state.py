"""Megatron's optimizer state in the shapes and names of engines/sharded_state.py."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection

from pltmoe.engines.megatron_optimizer import ensure_state
from pltmoe.engines.sharded_state import sharding_metadata


def optimizer_state(
    optimizer: ChainedOptimizer,
    weights: dict[str, Any],
    groups: ProcessGroupCollection,
    loading: bool,
) -> dict[int, Any]:
    """Describe fp32 master weights and Adam's moments by part; collective when saving.

    With expert parallelism there are two parts, experts and the rest, and one part without. What
    Megatron would store beside the tensors depends on that, so it is left out.
    """
    ensure_state(optimizer)
    metadata = sharding_metadata(groups)
    found = {}
    for index, part in enumerate(optimizer.chained_optimizers):
        with _places_without_padding(part):
            state = part.sharded_state_dict(
                {"model": weights}, is_loading=loading, metadata=metadata
            )
        found[index] = state["param_state"]
    return found


@contextmanager
def _places_without_padding(part: Any) -> Iterator[None]:
    """Tell a distributed optimizer where its weights lie once the buckets' padding is gone.

    Megatron joins the buckets without the padding at their ends and then looks the weights up at
    the places with it: from the second bucket on it would store the wrong numbers, silently.
    """
    kept = [buffer.param_index_map for buffer in part.buffers]
    try:
        for buffer in part.buffers:
            padding = [0]
            for bucket in buffer.buckets:
                padding.append(padding[-1] + bucket.grad_data.numel() - bucket.numel_unpadded)
            buffer.param_index_map = {
                parameter: (start - padding[bucket], end - padding[bucket], bucket)
                for parameter, (start, end, bucket) in buffer.param_index_map.items()
            }
        yield
    finally:
        for buffer, places in zip(part.buffers, kept, strict=True):
            buffer.param_index_map = places


def restore_optimizer(optimizer: ChainedOptimizer, loaded: dict[int, Any], step: int) -> None:
    """Load moments and master weights after ``step`` updates; hyperparameters stay this run's.

    Megatron's own ``load_state_dict`` fails with PyTorch's AdamW: it looks for the step count of
    each parameter among the stored tensors. All counts are the same number, so it is set here.
    """
    for index, part in enumerate(optimizer.chained_optimizers):
        adam = part.optimizer
        for state in adam.state.values():
            state.pop("step", None)
        part.load_parameter_state_from_fully_reshardable(loaded[index])
        if isinstance(adam, torch.optim.AdamW):
            for state in adam.state.values():
                state["step"] = torch.tensor(float(step))
        else:  # Transformer Engine and Apex count per group
            for group in adam.param_groups:
                group["step"] = step
