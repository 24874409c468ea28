"""A run configuration to track, and the metrics a small MoE logs."""

import math
from pathlib import Path
from typing import Any

from pltmoe.config import RunConfig, config_from_dict

MODEL = {
    "vocab_size": 512,
    "num_layers": 3,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 16,
    "num_experts": 8,
    "moe_top_k": 2,
    "moe_ffn_hidden_size": 32,
    "moe_aux_loss_coeff": 0.01,
}
LOOPED = {"num_loops": 2}
PLT = LOOPED | {
    "cross_loop_shift": True,
    "share_first_loop_kv": True,
    "gated_swa": True,
    "normalize_per_loop": True,
    "hidden_scale": 0.053,
}


def run_config(run_dir: Path, uri: str | None = None, **changes: Any) -> RunConfig:
    """Changes are dotted by two underscores: ``train__steps=20``, ``model__num_loops=2``."""
    tree: dict[str, Any] = {
        "name": "small",
        "model": dict(MODEL),
        "data": {
            "tokenizer": "tokenizer.model",
            "train": [{"path": "corpus"}],
            "split": [98, 2, 0],
            "sequence_length": 128,
        },
        "optimizer": {"lr": 1e-3},
        "train": {"output_dir": str(run_dir), "steps": 1000, "global_batch_size": 8},
        "tracking": {"mlflow_uri": uri, "experiment": "tests", "system_metrics": False},
    }
    for key, value in changes.items():
        *path, last = key.split("__")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
    return config_from_dict(tree)


def metrics_of(step: int, config: RunConfig) -> dict[str, float]:
    """A loss that falls, and per-loop, per-layer numbers that depend on the step alone."""
    model = config.model
    values = {
        "train/loss": 2.0 + 4.0 * math.exp(-step / 300) + 0.02 * math.sin(step),
        "optim/lr": 1e-3,
        "optim/grad_norm": 1.0 / (1 + step / 100),
        "perf/tokens_per_second_per_gpu": 5000.0 + step,
    }
    for loop in range(1, model.num_loops + 1):
        for layer in range(1, model.num_layers + 1):
            where = f"loop_{loop}/layer_{layer:02d}"
            values[f"moe/load_imbalance/{where}"] = 1 + 0.1 * layer + 1 / (1 + step / 50)
            if loop > 1 and model.gated_swa:
                values[f"plt/gate_mean/{where}"] = 0.5 + 0.03 * layer * math.tanh(step / 300)
    if step % 50 == 0:
        values["valid/loss"] = values["train/loss"] + 0.05
    return values
