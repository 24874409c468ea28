"""The configuration in both languages: our model section <-> a Hugging Face config.json."""

from collections.abc import Mapping
from typing import Any

import torch

from pltmoe.config import ModelConfig, model_from_dict
from pltmoe.errors import ConfigError, ConversionError
from pltmoe.model.grouped_product import fits_grouped_product

SAME_MEANING = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "tied_embeddings": "tie_word_embeddings",
    "norm_eps": "rms_norm_eps",
    "init_std": "initializer_range",
}
"""Fields that every model has: ours -> Hugging Face."""

MOE_FIELDS = {
    "num_experts": "num_experts",
    "moe_top_k": "num_experts_per_tok",
    "moe_ffn_hidden_size": "moe_intermediate_size",
    "moe_aux_loss_coeff": "router_aux_loss_coef",
}
"""Fields of a mixture of experts; names of Qwen3-MoE."""

LOOP_FIELDS = {
    "num_loops": "plt_num_loops",
    "cross_loop_shift": "plt_cross_loop_shift",
    "share_first_loop_kv": "plt_share_first_loop_kv",
    "gated_swa": "plt_gated_swa",
    "gate_use_hidden_states": "plt_gate_use_hidden_states",
    "normalize_per_loop": "plt_normalize_per_loop",
    "emb_scale": "plt_emb_scale",
    "hidden_scale": "plt_hidden_scale",
    "moe_loop_routing": "plt_loop_routing",
    "qk_norm": "use_qk_norm",
}
"""Fields that only ``plt_moe`` has; ``plt_window_size`` and the router's are handled apart."""

ROUTER_TRAINING_FIELDS = {
    "moe_z_loss_coeff": "router_z_loss_coef",
    "moe_expert_bias_update_rate": "router_bias_update_rate",
}
"""Only for training; kept in ``plt_moe`` configs so that nothing is lost on the way back."""

ARCHITECTURES = {
    "plt_moe": "PLTMoEForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_RENAMED = {"num_local_experts": "num_experts"}  # as newer transformers write Qwen3-MoE configs
AUTO_MAP = {
    "AutoConfig": "configuration_plt_moe.PLTMoEConfig",
    "AutoModel": "modeling_plt_moe.PLTMoEModel",
    "AutoModelForCausalLM": "modeling_plt_moe.PLTMoEForCausalLM",
    # `transformers serve` asks for this first, and otherwise only finds classes of its own package.
    "AutoModelForDecision": "modeling_plt_moe.PLTMoEForCausalLM",
}


def hf_model_type(m: ModelConfig) -> str:
    """Return the model_type of the export: a stock Qwen3 where that computes the same thing."""
    stock = m.num_loops == 1 and m.qk_norm and m.moe_expert_bias_update_rate == 0
    if not stock:
        return "plt_moe"
    return "qwen3_moe" if m.is_moe else "qwen3"


def to_hf_fields(
    m: ModelConfig, max_position_embeddings: int = 4096, model_type: str | None = None
) -> dict[str, Any]:
    """Return the model part of config.json (no dtype, no token ids).

    Args:
        m: the model section.
        max_position_embeddings: the sequence length it was trained with.
        model_type: default :func:`hf_model_type`; ``plt_moe`` can express every model.

    Raises:
        ConversionError: a field of the model section that this file does not write.
    """
    kind = model_type or hf_model_type(m)
    _refuse_unwritten(m, kind)
    fields: dict[str, Any] = {"model_type": kind, "architectures": [ARCHITECTURES[kind]]}
    fields |= {hf: getattr(m, ours) for ours, hf in SAME_MEANING.items()}
    fields |= {
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "max_position_embeddings": max_position_embeddings,
        "rope_parameters": {"rope_type": "default", "rope_theta": m.rope_theta},
    }
    if m.is_moe:
        fields |= {hf: getattr(m, ours) for ours, hf in MOE_FIELDS.items()}
        fields |= {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}
        sizes = (m.hidden_size, m.moe_ffn_hidden_size or 0)
        if kind == "qwen3_moe" and not fits_grouped_product(sizes, torch.bfloat16):
            fields["experts_implementation"] = "eager"  # transformers' default would raise
    else:
        fields["intermediate_size"] = m.ffn_hidden_size
    if kind == "plt_moe":
        fields |= _plt_fields(m)
    return fields


def from_hf_fields(fields: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """Return our model section for a Hugging Face configuration.

    Raises:
        ConversionError: another architecture, or an option that this model does not have.
    """
    kind = fields.get("model_type")
    if kind not in ARCHITECTURES:
        raise ConversionError(
            f"{where}: model_type is {kind!r}; only {', '.join(ARCHITECTURES)} can be converted"
        )
    fields = {_RENAMED.get(name, name): value for name, value in fields.items()}
    _refuse_options(fields, where)
    is_moe = kind == "qwen3_moe" or bool(kind == "plt_moe" and fields.get("num_experts"))
    names = SAME_MEANING | (MOE_FIELDS if is_moe else {"ffn_hidden_size": "intermediate_size"})
    if kind == "plt_moe":
        names = names | LOOP_FIELDS
    optional = {"initializer_range", "router_aux_loss_coef", "tie_word_embeddings"}
    optional.add("plt_loop_routing")  # exports of before it was there
    if missing := [hf for hf in names.values() if hf not in fields and hf not in optional]:
        raise ConversionError(f"{where}: field missing: {missing[0]}")
    tree = {ours: fields[hf] for ours, hf in names.items() if hf in fields}
    tree["rope_theta"] = rope_theta(fields, where)
    if kind == "plt_moe":
        tree["window_keys"] = _window_keys(fields, where)
        extra = ROUTER_TRAINING_FIELDS.items() if is_moe else ()
        tree |= {ours: fields[hf] for ours, hf in extra if hf in fields}
    try:
        return model_from_dict(tree, where)
    except ConfigError as error:
        raise ConversionError(str(error)) from None


def _refuse_unwritten(m: ModelConfig, kind: str) -> None:
    """Refuse what would be lost without a word: the logits of both sides would still agree."""
    written = {"ffn_hidden_size", "rope_theta", "window_keys"}
    written.update(SAME_MEANING, MOE_FIELDS, ROUTER_TRAINING_FIELDS)
    written.update(LOOP_FIELDS if kind == "plt_moe" else ())
    for name, field in ModelConfig.model_fields.items():
        if name not in written and getattr(m, name) != field.default:
            raise ConversionError(
                f"model.{name} ({getattr(m, name)}) has no place in the config.json of a {kind}: "
                "add it to pltmoe/hf/fields.py, and to what reads it (docs/design.md)"
            )


def _plt_fields(m: ModelConfig) -> dict[str, Any]:
    fields = {hf: getattr(m, ours) for ours, hf in LOOP_FIELDS.items()}
    fields["plt_window_size"] = [m.window_keys - 1, 0]
    fields["auto_map"] = dict(AUTO_MAP)
    if m.is_moe:
        fields |= {hf: getattr(m, ours) for ours, hf in ROUTER_TRAINING_FIELDS.items()}
        fields["use_expert_bias"] = m.moe_expert_bias_update_rate > 0
    else:
        fields["num_experts"] = 0
    return fields


def rope_theta(fields: Mapping[str, Any], where: str) -> float:
    """Return the base of the only kind of RoPE that there is here.

    Raises:
        ConversionError: there is none, or RoPE of another kind or with options.
    """
    rope: dict[str, Any] = {}
    for name in ("rope_scaling", "rope_parameters"):
        given = fields.get(name) or {}
        if not isinstance(given, Mapping):
            raise ConversionError(f"{where}: {name} is {given!r}; it must be a section")
        rope |= {key: value for key, value in given.items() if value is not None}
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    theta = rope.pop("rope_theta", fields.get("rope_theta"))
    part = rope.pop("partial_rotary_factor", fields.get("partial_rotary_factor"))
    if kind != "default" or part not in (None, 1) or rope:
        others = {"rope_type": kind, "partial_rotary_factor": part} | rope
        raise ConversionError(
            f"{where}: only the default rope_type can be converted, without options ({others})"
        )
    if theta is None:
        raise ConversionError(f"{where}: field missing: rope_parameters.rope_theta")
    return theta


def _window_keys(fields: Mapping[str, Any], where: str) -> int:
    match fields.get("plt_window_size"):
        case [int(left), 0] if left >= 0:
            return left + 1
        case window:
            raise ConversionError(
                f"{where}: plt_window_size is {window!r}; only [left, 0] can be converted"
            )


def _refuse_options(fields: Mapping[str, Any], where: str) -> None:
    refused: dict[str, Any] = {
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "plt_gate_norm": False,
        "quantization_config": None,
    }
    known = {*LOOP_FIELDS.values(), "plt_window_size", *refused}
    refused |= {name: None for name in fields if name.startswith("plt_") and name not in known}
    given = dict(fields)
    layers = given.get("layer_types") or []
    if not isinstance(layers, list) or any(kind != "full_attention" for kind in layers):
        raise ConversionError(f"{where}: layer_types is {layers!r}; only full_attention can be "
                              "converted")  # fmt: skip
    if fields["model_type"] == "qwen3_moe":
        given.setdefault("norm_topk_prob", False)  # its default; ours is true
    for name, only in refused.items():
        if given.get(name, only) not in (only, None):
            raise ConversionError(
                f"{where}: {name} is {given[name]!r}; only {only!r} can be converted"
            )
