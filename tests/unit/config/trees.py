"""Small configurations that are valid, for tests that break one thing in them."""

import copy
from typing import Any

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

LOOP_ROWS: dict[str, dict[str, Any]] = {
    "1 vanilla": {},
    "2 loop": {"num_loops": 2},
    "3 clp": {"num_loops": 2, "cross_loop_shift": True},
    "4 shared kv": {"num_loops": 2, "cross_loop_shift": True, "share_first_loop_kv": True},
}
LOOP_ROWS["5 plt2"] = LOOP_ROWS["4 shared kv"] | {"gated_swa": True, "window_keys": 3}
LOOP_ROWS["6 plt3"] = LOOP_ROWS["5 plt2"] | {"num_loops": 3}


def run_tree(**changes: Any) -> dict[str, Any]:
    """A whole run as a dict; ``changes`` are dotted paths with __ for the dot."""
    tree: dict[str, Any] = {
        "name": "small",
        "model": copy.deepcopy(MOE),
        "data": {
            "tokenizer": "tokenizer.model",
            "train": [{"path": "corpus"}],
            "sequence_length": 32,
        },
        "optimizer": {"lr": 1e-3},
        "train": {"output_dir": "runs/small", "steps": 10, "global_batch_size": 4},
    }
    for path, value in changes.items():
        section, nested, key = path.partition("__")
        if nested:
            tree.setdefault(section, {})[key] = value
        else:
            tree[section] = value
    return tree
