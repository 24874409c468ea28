"""A tiny run for engine tests: configuration, seeded batches, an engine on this rank."""

from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

from pltmoe import engines
from pltmoe.config import RunConfig
from pltmoe.engines import megatron_optimizer
from pltmoe.engines.base import StepResult
from pltmoe.parallel.groups import create_groups, destroy_groups
from pltmoe.parallel.layout import Layout, layout_for
from pltmoe.runtime import distributed, seeds
from tests.configs import PLT2, run_config

MOE = {
    "vocab_size": 64,
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "num_experts": 4,
    "moe_top_k": 2,
    "moe_ffn_hidden_size": 16,
    "moe_aux_loss_coeff": 0.02,
    "moe_z_loss_coeff": 0.01,
    "moe_expert_bias_update_rate": 0.01,
    "window_keys": 4,
    "init_std": 0.3,
    **PLT2,
}
"""PLT-2 with every loss of the router on."""

DENSE = {k: v for k, v in MOE.items() if "moe" not in k and k != "num_experts"} | {
    "ffn_hidden_size": 48
}


def tiny_config(model: dict[str, Any] | None = None, **changes: Any) -> RunConfig:
    """Return a run of 16-token sequences; ``changes`` are dotted paths with ``__`` for dots."""
    sections = {
        "name": "tiny",
        "model": model or MOE,
        "data__sequence_length": 16,
        "optimizer": {"lr": 1e-2, "warmup_steps": 2, "min_lr": 1e-3},
        "train__global_batch_size": 8,
        "train__micro_batch_size": 2,
    }
    return run_config(**sections | changes)


def build_engine(config: RunConfig) -> Any:
    """Start the processes as a run does, and build the engine that the configuration names."""
    processes = distributed.processes_from_environment()
    distributed.start(processes)
    layout = layout_for(config, processes.world_size)
    groups = create_groups(layout)
    seeds.seed_everything(config.train.seed)
    return engines.build_engine(config, layout, groups)


def numbers_of(results: list[StepResult], valid: tuple[float, int]) -> dict[str, Any]:
    """Return what steps and a validation batch have reported, by name."""
    return {
        "losses": [r.loss for r in results],
        "norms": [r.grad_norm for r in results],
        "rates": [r.learning_rate for r in results],
        "metrics": [r.model_metrics for r in results],
        "valid": valid[0] / valid[1],
    }


def small_buckets() -> Any:
    """Return a patch under which a tiny model's gradients fill several of Megatron's buckets."""
    return mock.patch.object(megatron_optimizer, "_BUCKET_PARAMETERS", 2500)


def drop_engine() -> None:
    """Forget the groups, so that the same processes can build another layout."""
    destroy_groups()


def batches(
    layout: Layout, skip_steps: int = 0, masked: bool = True, length: int = 16, cut: bool = True
) -> Iterator[dict[str, Any]]:
    """Yield this rank's micro batches, in the order of data/datasets.py.

    The last sequence of a micro batch holds two documents, cut anywhere, unless ``cut`` is false.
    """
    generator = torch.Generator().manual_seed(5)
    rank = layout.coordinates(torch.distributed.get_rank()).data
    micro, world = layout.micro_batch_size, layout.data_parallel_size
    per_step = layout.global_batch_size // micro
    for index in range(10**6):
        tokens = torch.randint(0, 64, (micro, length + 1), generator=generator)
        mask = (torch.rand(micro, length, generator=generator) < 0.7).float()
        positions = torch.arange(length).repeat(micro, 1)
        if cut:
            begin = int(torch.randint(1, length, (), generator=generator))
            positions[-1, begin:] -= begin
        if index < skip_steps * per_step or index % world != rank:
            continue
        yield {
            "tokens": tokens[:, :-1].contiguous(),
            "labels": tokens[:, 1:].contiguous(),
            "position_ids": positions,
            "loss_mask": mask if masked else torch.ones(micro, length),
        }
