"""What test_skipped_steps.py runs on its ranks: engines that meet a sick batch, whole runs too."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist

from pltmoe.engines.megatron import MegatronEngine
from pltmoe.train.pretrain import Data
from tests.distributed.engine_cases import moments, weights
from tests.distributed.pretrain_cases import run, same
from tests.distributed.tiny import MOE, batches, build_engine, drop_engine, tiny_config

SICK = 3
"""Number of the step that is to be skipped."""
SPIKES = {"train__spike_sigma": 4.0, "train__spike_window": 2}


def skipped_and_left_out(kind: str, **changes: Any) -> dict[str, Any]:
    """Five steps with step 3 sick; then the same five where nobody looks at step 3's data."""
    spikes = SPIKES if kind == "spike" else {}
    changes = {"train__steps": 10, **spikes, **changes}
    found = {"skipped": _five_steps(kind, changes), "left out": _five_steps("leave out", changes)}
    drop_engine()
    return found


def _five_steps(kind: str, changes: dict[str, Any]) -> dict[str, Any]:
    engine = build_engine(tiny_config(MOE, **changes))
    layout, results, untouched = engine.capabilities.layout, {}, None
    data = batches(layout)
    for step in range(1, 6):
        before = everything(engine) if step == SICK else None
        if step != SICK:
            results[step] = engine.train_step(data, step, watch=step == SICK + 1)
        elif kind == "leave out":
            list(islice(data, layout.micro_batches))
            engine._schedule.step(1)
        else:
            results[step] = _sick_step(engine, data, kind)
            untouched = same(before, everything(engine))
    return {
        "numbers": {k: (r.loss, r.grad_norm, r.learning_rate) for k, r in results.items()},
        "skipped": [k for k, r in results.items() if r.skipped],
        "totals": [r.skipped_steps for r in results.values()],
        "metrics": results[SICK + 1].model_metrics,
        "untouched": untouched,
        "end": everything(engine),
    }


def _sick_step(engine: MegatronEngine, data: Iterator[Any], kind: str) -> Any:
    """Take step 3 with one rank's data, or one weight's gradient, out of order."""
    last = dist.get_rank() == dist.get_world_size() - 1
    if kind == "loss":
        factor = float("nan") if last else 1.0
        data = ({**b, "loss_mask": b["loss_mask"] * factor} for b in data)
        return engine.train_step(data, SICK, watch=True)
    factor = {"gradient": float("inf"), "spike": 1e3}[kind]
    weight = next(iter(engine.model.layers.parameters()))
    hook = weight.register_hook(lambda gradient: gradient * factor if last else gradient)
    result = engine.train_step(data, SICK, watch=True)
    hook.remove()
    return result


def everything(engine: MegatronEngine) -> dict[Any, Any]:
    """Copy what a step changes: weights, expert biases, Adam's moments and step counts.

    Statistics are forgotten when the next step begins; its metrics tell.
    """
    counts = [
        float(state["step"])
        for part in engine._optimizer.chained_optimizers
        for state in part.optimizer.state.values()
        if "step" in state
    ]
    assert counts
    tensors = {**weights(engine), **moments(engine)}
    routed = {
        f"{number} {name}": buffer.clone()
        for number, layer in enumerate(engine.model.layers)
        for name, buffer in _routed(layer)
    }
    return {"counts": counts, "tensors": tensors, "routed": routed}


def _routed(layer: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [(n, b) for n, b in layer.named_buffers() if n.endswith("local_tokens_per_expert")]


def run_with_sick_data(arguments: list[str], steps: list[int]) -> tuple[int, str]:
    """Run tools/pretrain.py with data whose loss is NaN in some steps.

    Only the last rank's data are sick, and always the same sequences, also after a resume.
    """
    healthy = Data.train_from

    def train_from(self: Data, consumed_samples: int) -> Iterator[Any]:
        per_step = self._layout.micro_batches
        first = consumed_samples // self._layout.global_batch_size + 1
        for index, batch in enumerate(healthy(self, consumed_samples)):
            sick = (
                first + index // per_step in steps and dist.get_rank() == dist.get_world_size() - 1
            )
            factor = float("nan") if sick else 1.0
            yield {**batch, "loss_mask": batch["loss_mask"] * factor}

    Data.train_from = train_from
    try:
        return run(*arguments)
    finally:
        Data.train_from = healthy
