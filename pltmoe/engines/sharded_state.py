"""What every engine saves and loads, as sharded state dicts.

Tensors are stored in the model's own shapes under names that say what they are (``model.layers.0.
mlp.experts.experts.linear_fc1.weight``, ``optimizer.state.exp_avg.model.…``), so that they load
under any layout and in any engine. Hyperparameters and schedule are not stored: the configuration
is the only truth, and the checkpoint's must agree with it (checkpoint/compatible.py).
"""

from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import nn


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

    Transformer Engine's extra state (the history of FP8 scales) stays out: it would tie the
    weights to one implementation and one precision (see model/fp8_scales.py).
    """
    state = model.sharded_state_dict(metadata=sharding_metadata(groups))
    state = {name: part for name, part in state.items() if "._extra_state" not in name}
    add_prefix_for_sharding(state, "model.")
    return state


def rank_object(name: str, data: Any) -> ShardedObject:
    """Describe something of this rank's own, stored one per rank; None to have it loaded."""
    shape, offset = (dist.get_world_size(),), (dist.get_rank(),)
    return ShardedObject(name, data, shape, offset, replica_id=0)


def guard_object(state: dict[str, Any] | None) -> ShardedObject:
    """Describe the step guard's state, which all ranks share; None to have it loaded."""
    return ShardedObject("guard", state, (1,), (0,), replica_id=dist.get_rank())
