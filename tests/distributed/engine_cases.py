"""What test_engine.py runs on its ranks."""

from pathlib import Path
from typing import Any

import torch

from pltmoe.checkpoint import store
from pltmoe.checkpoint.manifest import Manifest, read_manifest
from pltmoe.config import RunConfig
from pltmoe.engines.megatron import MegatronEngine
from pltmoe.model.initialize import global_name
from tests.distributed.tiny import batches, build_engine, drop_engine, tiny_config


def train(
    steps: int,
    model: dict[str, Any] | None = None,
    save_to: Path | None = None,
    load_from: Path | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """Take ``steps`` steps; return what each reported and what is left behind, by global name."""
    config = tiny_config(model, **changes)
    engine = build_engine(config)
    start = _load(engine, load_from) if load_from else 0
    loaded_moments = moments(engine) if load_from else {}
    data = batches(engine.capabilities.layout, skip_steps=start)
    results = [engine.train_step(data, start + k + 1, watch=True) for k in range(steps)]
    valid = engine.eval_step(data)
    if save_to:
        _save(engine, config, save_to, start + steps)
    report = {
        "losses": [r.loss for r in results],
        "norms": [r.grad_norm for r in results],
        "rates": [r.learning_rate for r in results],
        "metrics": results[-1].model_metrics if results else {},
        "valid": valid[0] / valid[1],
        "weights": weights(engine),
        "biases": {n: b.clone() for n, b in engine.model.named_buffers() if "expert_bias" in n},
        "moments": moments(engine),
        "loaded_moments": loaded_moments,
    }
    drop_engine()
    return report


def weights(engine: MegatronEngine) -> dict[str, torch.Tensor]:
    """Return this rank's weights under their global names."""
    model = engine.model
    return {global_name(model, n): p.detach().clone() for n, p in model.named_parameters()}


def moments(engine: MegatronEngine) -> dict[str, torch.Tensor]:
    """Return Adam's second moments of this rank's shards, flat, with their place in the weight."""
    found = {}
    names = {parameter: n for n, parameter in engine.model.named_parameters()}
    for part in engine._optimizer.chained_optimizers:
        for ranges in part.gbuf_ranges:
            for buckets in ranges.values():
                for bucket in buckets:
                    for parameter, where in bucket["param_map"].items():
                        state = part._get_main_param_and_optimizer_states(parameter)
                        span = where["param"]
                        name = global_name(engine.model, names[parameter])
                        found[(name, span.start, span.end)] = state["exp_avg_sq"].clone()
    return found


def _save(engine: MegatronEngine, config: RunConfig, folder: Path, step: int) -> None:
    store.save_checkpoint(folder, engine.state(), Manifest(config=config, step=step, world_size=1))


def _load(engine: MegatronEngine, folder: Path) -> int:
    manifest = read_manifest(folder)
    engine.restore(
        store.load_state(folder, engine.placeholders("model", "optimizer")), manifest.step
    )
    return manifest.step
