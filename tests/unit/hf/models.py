"""Small models for the tests of the Hugging Face side: every ablation row, dense and MoE."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from pltmoe.config import ModelConfig, model_from_dict
from pltmoe.hf.configuration_plt_moe import PLTMoEConfig
from pltmoe.hf.fields import to_hf_fields
from pltmoe.hf.modeling_plt_moe import PLTMoEForCausalLM
from pltmoe.model.reference import ReferencePLT
from tests.configs import CLP, LOOP2, PLT2, PLT3, SHARED_KV

_BASE: dict[str, Any] = {
    "vocab_size": 61,
    "num_layers": 2,
    "hidden_size": 16,
    "num_attention_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "window_keys": 4,
}
_MOE = {"num_experts": 4, "moe_top_k": 2, "moe_ffn_hidden_size": 12}
_DENSE = {"ffn_hidden_size": 24}
_NORMED = {"normalize_per_loop": True, "emb_scale": 0.7, "hidden_scale": 0.3}

MODELS: dict[str, dict[str, Any]] = {
    "vanilla": _MOE,
    "loop2": _MOE | LOOP2,
    "clp": _MOE | CLP,
    "shared": _MOE | SHARED_KV,
    "plt2": _MOE | PLT2,
    "plt3": _MOE | PLT3,
    "plt3_normed": _MOE | PLT3 | _NORMED,
    "plt2_mha": _MOE | PLT2 | {"num_kv_heads": 4},
    "plt2_wide_window": _MOE | PLT2 | {"window_keys": 64},
    "plt2_window_of_one": _MOE | PLT2 | {"window_keys": 1},
    "plt2_gate_hidden": _MOE | PLT2 | {"gate_use_hidden_states": True},
    "plt2_expert_bias": _MOE | PLT2 | {"moe_expert_bias_update_rate": 0.001},
    "plt3_shared_routing": _MOE
    | PLT3
    | _NORMED
    | {"moe_expert_bias_update_rate": 0.001, "moe_loop_routing": "shared"},
    "loop2_shared_routing": _MOE | LOOP2 | {"moe_loop_routing": "shared"},
    "plt2_no_qk_norm": _MOE | PLT2 | {"qk_norm": False},
    "loop3": _MOE | {"num_loops": 3},
    "clp3_normed": _MOE | CLP | {"num_loops": 3} | _NORMED,
    "plt2_no_shift": _MOE | PLT2 | {"cross_loop_shift": False},
    "dense_vanilla": _DENSE,
    "dense_plt2": _DENSE | PLT2,
    "dense_plt3_normed": _DENSE | PLT3 | _NORMED,
    "tied": _DENSE | PLT2 | {"tied_embeddings": True},
}


ABLATION = ["vanilla", "loop2", "clp", "shared", "plt2", "plt3_normed"]
"""One of each row of the paper's ablation."""

EVERY_KIND = [
    *ABLATION, "loop3", "clp3_normed", "plt2_no_shift", "plt2_window_of_one", "plt2_mha",
    "plt2_gate_hidden", "plt2_expert_bias", "plt3_shared_routing", "dense_plt2",
    "dense_plt3_normed",
]  # fmt: skip
"""All that differs in decoding: no shift, normed, MHA, gates on both inputs, routing, dense."""


def small_model(name: str, **changes: Any) -> ModelConfig:
    """Return the model section called ``name``, with ``changes``."""
    return model_from_dict(_BASE | MODELS[name] | changes)


def tokens(b: int = 2, s: int = 13, seed: int = 1) -> Tensor:
    """Return random token ids [b, s]."""
    return torch.randint(0, 61, (b, s), generator=torch.Generator().manual_seed(seed))


def random_reference(
    m: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float64
) -> ReferencePLT:
    """Return a reference model whose every tensor is random: norms and gates too, biases too."""
    torch.manual_seed(seed)
    reference = ReferencePLT(m).to(dtype)
    for name, tensor in reference.state_dict().items():
        scale, centre = (0.2, 1.0) if "norm" in name else (0.3, 0.0)
        tensor.normal_(centre, scale)
    return reference


def hf_model(m: ModelConfig, **options: Any) -> PLTMoEForCausalLM:
    """Return the Hugging Face model (always ``plt_moe``, also where a stock model would do)."""
    config = PLTMoEConfig(**to_hf_fields(m, model_type="plt_moe"))
    return PLTMoEForCausalLM._from_config(config, **options)


def pair(m: ModelConfig, seed: int = 0, **options: Any) -> tuple[ReferencePLT, PLTMoEForCausalLM]:
    """Return reference and Hugging Face model in float64 with the same random weights."""
    reference = random_reference(m, seed)
    model = hf_model(m, **options).double()
    model.load_state_dict(stacked(m, reference.state_dict()))
    return reference, model.eval()


def stock_model(m: ModelConfig, weights: Mapping[str, Tensor]) -> Any:
    """Return transformers' own model with these weights."""
    moe = m.is_moe
    config = (Qwen3MoeConfig if moe else Qwen3Config)(**to_hf_fields(m))
    model = (Qwen3MoeForCausalLM if moe else Qwen3ForCausalLM)(config)
    model.load_state_dict(stacked(m, weights))
    return model.eval()


def stacked(m: ModelConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights with the experts of a layer in one tensor, as transformers 5 keeps them."""
    state = dict(weights)
    for layer in range(m.num_layers if m.is_moe else 0):
        prefix = f"model.layers.{layer}.mlp.experts."
        gate, up, down = (
            torch.stack([state.pop(f"{prefix}{e}.{name}.weight") for e in range(m.num_experts)])
            for name in ("gate_proj", "up_proj", "down_proj")
        )
        state[prefix + "gate_up_proj"] = torch.cat([gate, up], 1)
        state[prefix + "down_proj"] = down
    return state
