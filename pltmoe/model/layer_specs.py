"""Which module fills which slot of a layer. The only file in model/ that may name backends.

Both kinds of layers have the same parameters, under the same names in a checkpoint.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.experts import (
    GroupedMLPSubmodules,
    SequentialMLP,
    TEGroupedMLP,
)
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from torch import Tensor

from pltmoe.config.model import ModelConfig
from pltmoe.model.block import PLTLayer
from pltmoe.model.gated_attention import GatedAttentionSubmodules, GatedSelfAttention
from pltmoe.model.grouped_experts import GroupedExperts
from pltmoe.model.grouped_product import fits_grouped_product
from pltmoe.model.router import LoopRouter
from pltmoe.model.sdpa import SDPACoreAttention
from pltmoe.model.slots import Slots


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


@dataclass(frozen=True)
class Parts:
    """What a layer is built from."""

    norm: Callable[..., torch.nn.Module]
    column: Callable[..., Any]
    """A linear layer whose outputs tensor parallelism cuts."""
    row: Callable[..., Any]
    """A linear layer whose inputs it cuts."""
    attention: Callable[[int | None], Callable[..., Any]]
    """Keys of the window, or None for the whole past -> builder of an attention."""
    experts: Callable[..., Any]


def layer_spec(model: ModelConfig, config: TransformerConfig, slots: Slots) -> ModuleSpec:
    """Describe one layer, built from the parts that ``config.transformer_impl`` names."""
    is_te = config.transformer_impl == "transformer_engine"
    parts = _transformer_engine_parts() if is_te else _local_parts(config, slots)
    attention = ModuleSpec(
        module=GatedSelfAttention,
        params={"attn_mask_type": AttnMaskType.causal, "plt": model},
        submodules=GatedAttentionSubmodules(
            linear_qkv=parts.column,
            core_attention=parts.attention(None),
            local_attention=parts.attention(model.local_window),
            linear_proj=parts.row,
            q_layernorm=parts.norm if model.qk_norm else None,
            k_layernorm=parts.norm if model.qk_norm else None,
        ),
    )
    return ModuleSpec(
        module=PLTLayer,
        params={"plt": model},
        submodules=TransformerLayerSubmodules(
            input_layernorm=parts.norm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=parts.norm,
            mlp=_feed_forward(model, parts),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def _local_parts(config: TransformerConfig, slots: Slots) -> Parts:
    """PyTorch's and Megatron-core's own; runs everywhere."""
    linear = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    one_by_one = config.num_moe_experts is None or why_one_by_one(config)
    experts = SequentialMLP if one_by_one else GroupedExperts
    return Parts(
        norm=RMSNorm,
        column=ColumnParallelLinear,
        row=RowParallelLinear,
        attention=lambda window: partial(SDPACoreAttention, window_keys=window, slots=slots),
        experts=partial(experts, submodules=linear),
    )


def _transformer_engine_parts() -> Parts:
    """Transformer Engine's, through Megatron-core's wrappers.

    Norms stay modules of their own: fused into the linear layer after them their weights would
    have other names in checkpoints, and the gate reads what a norm returns.
    """
    from megatron.core.extensions import transformer_engine as te  # fails without the library

    grouped = GroupedMLPSubmodules(
        linear_fc1=te.TEColumnParallelGroupedLinear, linear_fc2=te.TERowParallelGroupedLinear
    )
    return Parts(
        norm=te.TENorm,
        column=te.TEColumnParallelLinear,
        row=te.TERowParallelLinear,
        attention=lambda window: partial(_te_attention, window_keys=window),
        experts=partial(TEGroupedMLP, submodules=grouped),
    )


def _te_attention(*, window_keys: int | None, config: TransformerConfig, **megatron: Any) -> Any:
    """Build an attention module; it takes its window from a configuration of its own.

    Context parallelism: a window needs keys gathered, Transformer Engine passes them on from rank
    to rank only for the whole past.
    """
    from megatron.core.extensions.transformer_engine import TEDotProductAttention

    if window_keys is None:
        return TEDotProductAttention(config=config, **megatron)
    own, attention = copy.copy(config), TEDotProductAttention
    own.window_size = (window_keys - 1, 0)
    own.window_attn_skip_freq = None  # else it depends on the layer's number
    megatron["cp_comm_type"] = "all_gather"
    if config.fp8 and not config.local_attention_in_fp8:
        attention = _bf16_attention()
    return attention(config=own, **megatron)


@cache
def _bf16_attention() -> type:
    """Return the class of an attention that stays bf16 where the other branch is FP8."""
    from megatron.core.extensions.transformer_engine import TEDotProductAttention
    from transformer_engine.pytorch import autocast

    class BF16Attention(TEDotProductAttention):
        def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            with autocast(enabled=False):
                return super().forward(*args, **kwargs)

    return BF16Attention


def why_one_by_one(config: TransformerConfig) -> str | None:
    """Say why local experts do not run in one grouped product on this machine; None if they do."""
    if not torch.cuda.is_available():
        return "torch's grouped product is a loop on a CPU"
    if config.params_dtype != torch.bfloat16:
        return "torch's grouped product is for bf16"
    assert config.moe_ffn_hidden_size is not None
    width = config.moe_ffn_hidden_size // (config.expert_tensor_parallel_size or 1)
    if not fits_grouped_product([config.hidden_size, width], config.params_dtype):
        return f"hidden size {config.hidden_size} or expert width {width} is no multiple of 8"
    return None


def _feed_forward(model: ModelConfig, parts: Parts) -> Any:
    if not model.is_moe:
        linear = MLPSubmodules(linear_fc1=parts.column, linear_fc2=parts.row)
        return partial(
            MLP.as_mlp_submodule, submodules=linear, ffn_hidden_size=model.ffn_hidden_size
        )
    return partial(MoELayer, submodules=MoESubmodules(experts=parts.experts, router=LoopRouter))
