"""What test_plan.py runs on its ranks: an engine, and the bytes that it holds."""

from typing import Any

from pltmoe.engines.megatron_optimizer import ensure_state
from tests.distributed.tiny import build_engine, drop_engine, tiny_config


def held_bytes(model: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Build an engine; return this rank's bytes by kind and its largest parameter."""
    engine = build_engine(tiny_config(model, **changes))
    ensure_state(engine._optimizer)
    buffers = [*engine._ddp.buffers, *engine._ddp.expert_parallel_buffers]
    parameters = list(engine.model.parameters())
    held = {
        "stage": engine._layout.coordinates(_rank()).stage,
        "parameters": sum(p.numel() * p.element_size() for p in parameters),
        "gradients": sum(buffer.grad_data.nbytes for buffer in buffers),
        "optimizer": sum(map(_optimizer_bytes, engine._optimizer.chained_optimizers)),
        "largest": max(p.numel() for p in parameters),
    }
    drop_engine()
    return held


def _optimizer_bytes(part: Any) -> int:
    """Moments, and master weights where they are not the weights themselves."""
    states = [t for state in part.optimizer.state.values() for t in state.values() if t.dim()]
    masters = [t for group in part.shard_fp32_from_float16_groups for t in group if t is not None]
    return sum(t.nbytes for t in [*states, *masters])


def _rank() -> int:
    import torch.distributed as dist

    return dist.get_rank()
