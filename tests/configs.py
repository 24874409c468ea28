"""Small runs that are valid: trees, for tests that break one thing in them, and configurations."""

from typing import Any

from pltmoe.config import RunConfig, config_from_dict

DENSE = {
    "vocab_size": 64,
    "num_layers": 2,
    "hidden_size": 16,
    "num_attention_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 6,  # heads * head_dim is not hidden_size, on purpose
    "ffn_hidden_size": 24,
}
EXPERTS = {"num_experts": 4, "moe_top_k": 2, "moe_ffn_hidden_size": 8, "ffn_hidden_size": None}
MOE = DENSE | EXPERTS

ONE_LOOP = {
    "num_loops": 1,
    "cross_loop_shift": False,
    "share_first_loop_kv": False,
    "gated_swa": False,
}
"""What makes any model a vanilla one."""
LOOP2 = {"num_loops": 2}
CLP = LOOP2 | {"cross_loop_shift": True}
SHARED_KV = CLP | {"share_first_loop_kv": True}
PLT2 = SHARED_KV | {"gated_swa": True}
PLT3 = PLT2 | {"num_loops": 3}
LOOP_ROWS: dict[str, dict[str, Any]] = {
    "1 vanilla": {},
    "2 loop": LOOP2,
    "3 clp": CLP,
    "4 shared kv": SHARED_KV,
    "5 plt2": PLT2 | {"window_keys": 3},
    "6 plt3": PLT3 | {"window_keys": 3},
}
"""The rows of the paper's ablation."""


def run_tree(**changes: Any) -> dict[str, Any]:
    """A whole run as a dict; ``changes`` are dotted paths with __ for the dot."""
    tree: dict[str, Any] = {
        "name": "small",
        "model": dict(MOE),
        "data": {
            "tokenizer": "tokenizer.model",
            "train": [{"path": "corpus"}],
            "sequence_length": 32,
        },
        "optimizer": {"lr": 1e-3},
        "train": {"output_dir": "runs/small", "steps": 10, "global_batch_size": 4},
    }
    for path, value in changes.items():
        *sections, key = path.split("__")
        node = tree
        for section in sections:
            node[section] = dict(node.get(section, {}))  # what is shared stays as it is
            node = node[section]
        node[key] = value
    return tree


def run_config(**changes: Any) -> RunConfig:
    """The same as a configuration."""
    return config_from_dict(run_tree(**changes))
