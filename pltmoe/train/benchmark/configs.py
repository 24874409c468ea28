"""Which configurations a comparison runs, and what it refuses before anything starts.

No Megatron here, so that a tool can ask before the processes are there.
"""

from collections.abc import Iterator
from typing import Any

import torch

from pltmoe.config import RunConfig, config_from_dict, config_to_dict
from pltmoe.errors import ConfigError
from pltmoe.parallel.layout import layout_for
from pltmoe.runtime import devices

MEGATRON, ZERO = "Megatron", "DeepSpeed, ZeRO 2"
_OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
ENGINES: dict[str, dict[str, Any] | None] = {
    MEGATRON: None,
    "DeepSpeed, ZeRO 0": {"stage": 0},
    "DeepSpeed, ZeRO 1": {"stage": 1},
    ZERO: {"stage": 2},
    "DeepSpeed, ZeRO 3": {"stage": 3},
    "DeepSpeed, ZeRO 2, optimizer in host memory": {"stage": 2, **_OFFLOAD},
}
"""Name -> DeepSpeed's zero_optimization."""
PRECISIONS = ("fp8", "bf16")
_ONE_LOOP = {
    "num_loops": 1,
    "cross_loop_shift": False,
    "share_first_loop_kv": False,
    "gated_swa": False,
    "gate_use_hidden_states": False,
    "normalize_per_loop": False,
    "emb_scale": 1.0,
    "hidden_scale": 1.0,
    "moe_loop_routing": "independent",
}


def as_vanilla(config: RunConfig) -> RunConfig:
    """Return the same run with one loop."""
    tree = config_to_dict(config)
    return config_from_dict({**tree, "model": {**tree["model"], **_ONE_LOOP}})


def in_engine(config: RunConfig, name: str) -> RunConfig:
    """Return the same run in an engine of ``ENGINES``.

    Raises:
        ConfigError: that engine cannot run it.
    """
    tree: dict[str, Any] = config_to_dict(config) | {"engine": "megatron", "deepspeed": {}}
    if (zero := ENGINES[name]) is not None:
        tree |= {"engine": "deepspeed", "deepspeed": {"zero_optimization": zero}}
    try:
        return config_from_dict(tree)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None


def in_precision(config: RunConfig, precision: str) -> RunConfig:
    """Return the same run with another ``train.precision``."""
    tree = config_to_dict(config)
    return config_from_dict({**tree, "train": {**tree["train"], "precision": precision}})


def check(name: str, config: RunConfig, processes: int) -> None:
    """Refuse what comparison ``name`` cannot measure of ``config`` on so many processes.

    Raises:
        ConfigError: naming the fields and what to set.
        EngineError: the processes cannot be split as the configuration says.
    """
    rules = {"pipeline": _pipeline, "megatron": _megatron}
    if name in rules and (found := list(rules[name](config))):
        raise ConfigError(f"--compare {name} {'; '.join(found)}")
    if name == "engines":
        for engine in (MEGATRON, ZERO):
            layout_for(in_engine(config, engine), processes)
    elif name == "precision":
        for precision in PRECISIONS:
            layout_for(in_precision(config, precision), processes)
    elif name in ("loops", "megatron"):
        layout_for(as_vanilla(config), processes)
    layout_for(config, processes)


def _pipeline(c: RunConfig) -> Iterator[str]:
    p = c.parallel
    if p.pipeline_parallel_size < 2 or p.tensor_parallel_size * p.context_parallel_size > 1:
        yield (
            "takes whole sequences through several stages: set "
            f"parallel.pipeline_parallel_size (is {p.pipeline_parallel_size}) to 2 or more, and "
            f"parallel.tensor_parallel_size (is {p.tensor_parallel_size}) and "
            f"parallel.context_parallel_size (is {p.context_parallel_size}) to 1"
        )


def _megatron(c: RunConfig) -> Iterator[str]:
    """What Megatron-core's own model would not do, or not as ours does."""
    p = c.parallel
    if c.engine != "megatron":
        yield f"compares the Megatron engine: set engine (is {c.engine}) to megatron"
    if p.recompute != "none":
        yield (
            "cannot recompute the same things in both models: set parallel.recompute "
            f"(is {p.recompute}) to none"
        )
    for axis in ("tensor", "pipeline", "context"):
        if (size := getattr(p, f"{axis}_parallel_size")) > 1:
            yield f"cuts nothing but experts: set parallel.{axis}_parallel_size (is {size}) to 1"
    if rate := c.model.moe_expert_bias_update_rate:
        yield (
            "has a softmax router, where Megatron-core ignores an expert bias: set "
            f"model.moe_expert_bias_update_rate (is {rate}) to 0"
        )
    if c.train.gradient_accumulation_fusion and (
        why_not := devices.why_no_apex_products(torch.bfloat16)
    ):
        yield (
            f"needs NVIDIA Apex for Megatron-core's head ({why_not}): set "
            "train.gradient_accumulation_fusion (is true) to false"
        )
