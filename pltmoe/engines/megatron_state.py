"""What the Megatron engine saves and loads, as sharded state dicts.

Tensors are stored in the model's own shapes under names that say what they are (``model.layers.0.
mlp.experts.experts.linear_fc1.weight``, ``optimizer.state.exp_avg.model.…``), so that they load
under any layout. Hyperparameters and schedule are not stored: the configuration is the only truth,
and the checkpoint's must agree with it (checkpoint/compatible.py).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import nn

from pltmoe.engines.megatron_optimizer import ensure_state
from pltmoe.runtime.seeds import random_state


def sharding_metadata(groups: ProcessGroupCollection) -> dict[str, Any]:
    """Return Megatron's switches for state that can be loaded under another layout.

    ``fully_reshardable`` stores optimizer state in the shapes of the weights. (The other formats
    store pieces of flat buffers, under keys with rank numbers in them.)
    """
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "singleton_local_shards": False,
        "dp_cp_group": groups.dp_cp,
    }


def model_state(model: nn.Module, groups: ProcessGroupCollection) -> dict[str, Any]:
    """Describe the weights; keys of the stored tensors begin with ``model.``.

    Transformer Engine's extra state (the history of FP8 scales) stays out: it would tie a
    checkpoint to one implementation and one precision.
    """
    state = model.sharded_state_dict(metadata=sharding_metadata(groups))
    state = {name: part for name, part in state.items() if "._extra_state" not in name}
    add_prefix_for_sharding(state, "model.")
    return state


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


def random_object(loading: bool) -> ShardedObject:
    """Describe this rank's random states, stored one per rank."""
    data = None if loading else random_state()
    shape, offset = (dist.get_world_size(),), (dist.get_rank(),)
    return ShardedObject("random", data, shape, offset, replica_id=0)


def guard_object(state: dict[str, Any] | None) -> ShardedObject:
    """Describe the step guard's state, which all ranks share; None to have it loaded."""
    return ShardedObject("guard", state, (1,), (0,), replica_id=dist.get_rank())


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
