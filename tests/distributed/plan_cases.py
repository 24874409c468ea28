"""What test_plan.py runs on its ranks: an engine, and the bytes that it holds."""

import time
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from pltmoe.engines.megatron_optimizer import ensure_state
from pltmoe.model import sdpa
from pltmoe.runtime.memory import tensor_bytes
from tests.distributed.tiny import batches, build_engine, drop_engine, tiny_config
from tests.unit.plan.live_memory import LiveMemory


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


def deepspeed_bytes(model: dict[str, Any], **changes: Any) -> dict[str, int]:
    """Return what an engine holds when built, and what gradients add: of one micro batch, of all.

    Of one: whole, where a stage keeps whole ones until the last; of all: this rank's part.
    """
    before = tensor_bytes()
    engine = build_engine(tiny_config(model, **changes))
    built = tensor_bytes() - before
    batch = next(batches(engine.capabilities.layout))
    set_boundary = engine._engine.set_gradient_accumulation_boundary
    found = {"built": built}
    for name, is_last in (("of one", False), ("of all", True)):
        engine._engine.set_gradient_accumulation_boundary = lambda _, is_last=is_last: set_boundary(
            is_last
        )
        engine._run([dict(batch)], forward_only=False)
        time.sleep(0.2)  # gloo's threads let go of what they reduced after the ranks have it
        found[name] = tensor_bytes() - before - built
    engine._engine.destroy()
    drop_engine()
    return found


def activation_bytes(model: dict[str, Any], **changes: Any) -> dict[str, int]:
    """Run one step; return the most bytes alive at the end of a forward pass of this stage."""
    engine = build_engine(tiny_config(model, **changes))
    pipeline, layout = engine.pipeline, engine.capabilities.layout
    length = engine.config.data.sequence_length
    source = batches(layout, length=length, cut=False)
    step = [next(source) for _ in range(layout.micro_batches)]
    buffers = [*engine._ddp.buffers, *engine._ddp.expert_parallel_buffers]
    known = [*engine.model.parameters(), *engine.model.buffers()]
    known += [tensor for buffer in buffers for tensor in (buffer.grad_data, buffer.param_data)]
    known += [tensor for batch in step for tensor in batch.values()]
    forward, seen = pipeline._forward_step, []
    memory = LiveMemory([tensor for tensor in known if tensor is not None])

    # PyTorch cannot make its bias, a subclass of Tensor, under a dispatch mode. On a CPU it only
    # stands for this mask.
    with mock.patch.object(sdpa, "causal_lower_right", lower_right), memory:

        def watched(*arguments: Any) -> Any:
            result = forward(*arguments)
            seen.append(memory.alive())
            return result

        pipeline._forward_step = watched
        pipeline.run(step, forward_only=False)
    report = {"stage": layout.coordinates(_rank()).stage, "most": max(seen), "chunks": len(seen)}
    drop_engine()
    return report


def lower_right(queries: int, keys: int) -> torch.Tensor:
    """Mask [queries, keys] in which the last query sees all keys."""
    return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)


def _optimizer_bytes(part: Any) -> int:
    """Moments, and master weights where they are not the weights themselves."""
    states = [t for state in part.optimizer.state.values() for t in state.values() if t.dim()]
    masters = [t for group in part.shard_fp32_from_float16_groups for t in group if t is not None]
    return sum(t.nbytes for t in [*states, *masters])


def _rank() -> int:
    return dist.get_rank()
