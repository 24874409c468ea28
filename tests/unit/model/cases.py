"""Small models that cover every option: the six ablation rows and what varies besides."""

from typing import Any

from pltmoe.config import ModelConfig, model_from_dict
from tests import configs
from tests.configs import CLP, LOOP2, SHARED_KV

PLT2, PLT3 = (plt | {"window_keys": 5} for plt in (configs.PLT2, configs.PLT3))
NORMED = PLT3 | {"normalize_per_loop": True}

ROWS: dict[str, dict[str, Any]] = {
    "row1_vanilla": {"num_loops": 1},
    "row2_loop2": LOOP2,
    "row3_clp": CLP,
    "row4_shared_kv": SHARED_KV,
    "row5_plt2": PLT2,
    "row6_plt3": PLT3,
}
DENSE = {"num_experts": None, "moe_top_k": None, "moe_ffn_hidden_size": None, "ffn_hidden_size": 48}
VARIANTS: dict[str, dict[str, Any]] = {
    "loop3": {"num_loops": 3},
    "clp_loop3": CLP | {"num_loops": 3},
    "shared_loop3": SHARED_KV | {"num_loops": 3},
    "shared_without_shift": SHARED_KV | {"cross_loop_shift": False},
    "mha": PLT2 | {"num_kv_heads": 4},
    "window_one": PLT2 | {"window_keys": 1},
    "window_over_sequence": PLT2 | {"window_keys": 500},
    "norm_and_scales": NORMED | {"emb_scale": 0.707, "hidden_scale": 0.053},
    "gate_on_hidden": PLT2 | {"gate_use_hidden_states": True},
    "no_qk_norm": PLT2 | {"qk_norm": False},
    "tied": PLT2 | {"tied_embeddings": True},
    "expert_bias": PLT2 | {"moe_expert_bias_update_rate": 1e-3},
    "router_losses": PLT3 | {"moe_aux_loss_coeff": 0.1, "moe_z_loss_coeff": 0.01},
    "shared_routing_loop2": LOOP2 | {"moe_loop_routing": "shared"},
    "shared_routing_plt2": PLT2 | {"moe_loop_routing": "shared"},
    "shared_routing_plt3": {
        **NORMED,
        "moe_aux_loss_coeff": 0.1,
        "moe_z_loss_coeff": 0.01,
        "moe_expert_bias_update_rate": 1e-3,
        "moe_loop_routing": "shared",
    },
}
ALL: dict[str, dict[str, Any]] = {
    **ROWS,
    **VARIANTS,
    **{f"dense_{name}": {**row, **DENSE} for name, row in ROWS.items()},
    "dense_mha": PLT2 | DENSE | {"num_kv_heads": 4},
}


def small_model(**changes: Any) -> ModelConfig:
    """A model of a few thousand parameters with ``changes`` applied."""
    base = {
        "vocab_size": 61,
        "num_layers": 2,
        "hidden_size": 24,
        "num_attention_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 6,
        "num_experts": 6,
        "moe_top_k": 2,
        "moe_ffn_hidden_size": 16,
        "init_std": 0.2,
    }
    merged = {**base, **changes}
    return model_from_dict({key: value for key, value in merged.items() if value is not None})
