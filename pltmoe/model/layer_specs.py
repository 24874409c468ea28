"""Which module fills which slot of a layer. The only file in model/ that may name backends."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from torch import Tensor

from pltmoe.config.model import ModelConfig
from pltmoe.model.block import PLTLayer
from pltmoe.model.gated_attention import GatedAttentionSubmodules, GatedSelfAttention
from pltmoe.model.grouped_experts import GroupedExperts, fits_grouped_product
from pltmoe.model.router import LoopRouter
from pltmoe.model.sdpa import SDPACoreAttention
from pltmoe.model.slots import Slots
from pltmoe.runtime.devices import Backend, device


class RMSNorm(torch.nn.Module):
    """PyTorch's fused RMSNorm in Megatron's norm slot.

    Megatron's own torch norm refuses sequence parallelism because its weight is not marked.
    """

    def __init__(self, *, config: TransformerConfig, hidden_size: int, eps: float, **_: Any):
        super().__init__()
        device = torch.cuda.current_device()
        ones = torch.ones(hidden_size, dtype=config.params_dtype, device=device)
        self.weight, self.eps = torch.nn.Parameter(ones), eps
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def layer_spec(model: ModelConfig, config: TransformerConfig, slots: Slots) -> ModuleSpec:
    """Describe one layer built from PyTorch and Megatron-core parts (no Transformer Engine)."""
    local = partial(SDPACoreAttention, window_keys=model.local_window, slots=slots)
    attention = ModuleSpec(
        module=GatedSelfAttention,
        params={"attn_mask_type": AttnMaskType.causal, "plt": model},
        submodules=GatedAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=partial(SDPACoreAttention, slots=slots),
            local_attention=local,
            linear_proj=RowParallelLinear,
            q_layernorm=RMSNorm if model.qk_norm else None,
            k_layernorm=RMSNorm if model.qk_norm else None,
        ),
    )
    return ModuleSpec(
        module=PLTLayer,
        params={"plt": model},
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=_feed_forward(model, config),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def backends(model: ModelConfig, config: TransformerConfig) -> dict[str, Backend]:
    """Say who computes what, and why."""
    reason = "the layer specs are built from PyTorch parts"
    found = {
        "attention": Backend("torch", f"scaled_dot_product_attention: {reason}"),
        "norm": Backend("torch", f"rms_norm: {reason}"),
    }
    if model.is_moe:
        one_by_one = why_one_by_one(config, device())
        how = "grouped_mm, all experts at once: there is no Transformer Engine variant yet"
        if one_by_one is not None:
            how = f"one matrix product pair per expert: {one_by_one}"
        found["experts"] = Backend("torch", how)
    return found


def why_one_by_one(config: TransformerConfig, where: torch.device) -> str | None:
    """Say why experts do not run in one grouped product on this device; None if they do."""
    if where.type != "cuda":
        return "torch's grouped product is a loop on a CPU"
    if config.params_dtype != torch.bfloat16:
        return "torch's grouped product is for bf16"
    assert config.moe_ffn_hidden_size is not None
    width = config.moe_ffn_hidden_size // (config.expert_tensor_parallel_size or 1)
    if not fits_grouped_product([config.hidden_size, width], config.params_dtype):
        return f"hidden size {config.hidden_size} or expert width {width} is no multiple of 8"
    return None


def _feed_forward(model: ModelConfig, config: TransformerConfig) -> Any:
    linear = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    if not model.is_moe:
        return partial(
            MLP.as_mlp_submodule, submodules=linear, ffn_hidden_size=model.ffn_hidden_size
        )
    experts_class = SequentialMLP if why_one_by_one(config, device()) else GroupedExperts
    experts = partial(experts_class, submodules=linear)
    return partial(MoELayer, submodules=MoESubmodules(experts=experts, router=LoopRouter))
