"""Small models that cover every option: the six ablation rows and what varies besides."""

from typing import Any

from pltmoe.config import ModelConfig, model_from_dict

CLP = {"cross_loop_shift": True}
SHARED = {**CLP, "share_first_loop_kv": True}
PLT = {**SHARED, "gated_swa": True, "window_keys": 5}

ROWS: dict[str, dict[str, Any]] = {
    "row1_vanilla": {"num_loops": 1},
    "row2_loop2": {"num_loops": 2},
    "row3_clp": {"num_loops": 2, **CLP},
    "row4_shared_kv": {"num_loops": 2, **SHARED},
    "row5_plt2": {"num_loops": 2, **PLT},
    "row6_plt3": {"num_loops": 3, **PLT},
}
DENSE = {"num_experts": None, "moe_top_k": None, "moe_ffn_hidden_size": None, "ffn_hidden_size": 48}
VARIANTS: dict[str, dict[str, Any]] = {
    "loop3": {"num_loops": 3},
    "clp_loop3": {"num_loops": 3, **CLP},
    "shared_loop3": {"num_loops": 3, **SHARED},
    "shared_without_shift": {"num_loops": 2, "share_first_loop_kv": True},
    "mha": {"num_loops": 2, **PLT, "num_kv_heads": 4},
    "window_one": {"num_loops": 2, **PLT, "window_keys": 1},
    "window_over_sequence": {"num_loops": 2, **PLT, "window_keys": 500},
    "norm_and_scales": {
        "num_loops": 3,
        **PLT,
        "normalize_per_loop": True,
        "emb_scale": 0.707,
        "hidden_scale": 0.053,
    },
    "gate_on_hidden": {"num_loops": 2, **PLT, "gate_use_hidden_states": True},
    "no_qk_norm": {"num_loops": 2, **PLT, "qk_norm": False},
    "tied": {"num_loops": 2, **PLT, "tied_embeddings": True},
    "expert_bias": {"num_loops": 2, **PLT, "moe_expert_bias_update_rate": 1e-3},
    "router_losses": {"num_loops": 3, **PLT, "moe_aux_loss_coeff": 0.1, "moe_z_loss_coeff": 0.01},
    "shared_routing_loop2": {"num_loops": 2, "moe_loop_routing": "shared"},
    "shared_routing_plt2": {"num_loops": 2, **PLT, "moe_loop_routing": "shared"},
    "shared_routing_plt3": {
        "num_loops": 3,
        **PLT,
        "normalize_per_loop": True,
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
    "dense_mha": {"num_loops": 2, **PLT, **DENSE, "num_kv_heads": 4},
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
