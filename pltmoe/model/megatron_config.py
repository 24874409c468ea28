"""From our model section to Megatron's TransformerConfig: the only file that sets its fields."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from pltmoe.config.model import ModelConfig
from pltmoe.config.run import Fp8Recipe, ParallelConfig


@dataclass(frozen=True)
class Fp8:
    """Matrix products in FP8, and which attention branches."""

    recipe: Fp8Recipe
    global_attention: bool = False
    local_attention: bool = False


def transformer_config(
    model: ModelConfig,
    *,
    params_dtype: torch.dtype = torch.float32,
    parallel: ParallelConfig | None = None,
    transformer_impl: Literal["local", "transformer_engine"] = "local",
    fp8: Fp8 | None = None,
    gradient_accumulation_fusion: bool = False,
    deterministic: bool = False,
) -> TransformerConfig:
    """Describe one Qwen3-style layer of ``model``, and where it runs, to Megatron-core.

    Loss gradients are divided by the number of tokens of the global batch
    (``calculate_per_token_loss``), so the loss is the same mean on every layout.
    """
    p, is_te = parallel or ParallelConfig(), transformer_impl == "transformer_engine"
    config = TransformerConfig(
        transformer_impl=transformer_impl,
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_kv_heads,
        kv_channels=model.head_dim,
        ffn_hidden_size=model.ffn_hidden_size or model.moe_ffn_hidden_size,
        gated_linear_unit=True,
        activation_func=F.silu,
        bias_activation_fusion=True,
        apply_rope_fusion=is_te,
        cross_entropy_loss_fusion=params_dtype == torch.bfloat16,  # its gradients are bf16
        add_bias_linear=False,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_eps,
        qk_layernorm=model.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_dropout_fusion=False,
        init_method_std=model.init_std,
        perform_initialization=False,  # model/initialize.py does it, the same for every layout
        params_dtype=params_dtype,
        pipeline_dtype=params_dtype,
        bf16=params_dtype == torch.bfloat16,
        gradient_accumulation_fusion=gradient_accumulation_fusion,
        deterministic_mode=deterministic,  # another backward pass of the embedding
        calculate_per_token_loss=True,
        tensor_model_parallel_size=p.tensor_parallel_size,
        sequence_parallel=p.sequence_parallel and p.tensor_parallel_size > 1,
        pipeline_model_parallel_size=p.pipeline_parallel_size,
        context_parallel_size=p.context_parallel_size,
        expert_model_parallel_size=p.expert_parallel_size,
        expert_tensor_parallel_size=p.expert_tensor_parallel_size,
        **_moe_fields(model, params_dtype, is_te, fp8),
        **_fp8_fields(fp8),
    )
    config.local_attention_in_fp8 = fp8 is not None and fp8.local_attention
    # Set afterwards: Megatron refuses an expert bias with softmax scores, where its own top-k
    # ignores it. Our router (router.py) adds it, and finalize_model_grads updates it.
    config.moe_router_enable_expert_bias = model.moe_expert_bias_update_rate > 0
    config.moe_router_bias_update_rate = model.moe_expert_bias_update_rate
    # Our own layers recompute (block.py, gated_attention.py), and none of Megatron's modules.
    config.recompute_granularity = None if p.recompute == "none" else p.recompute
    config.recompute_modules = []
    return config


def _fp8_fields(fp8: Fp8 | None) -> dict[str, Any]:
    if fp8 is None:
        return {}
    return {
        # Scales of blocks are near enough for gradients to need no wider exponent.
        "fp8": "e4m3" if fp8.recipe in ("blockwise", "mxfp8") else "hybrid",
        "fp8_recipe": fp8.recipe,
        # Megatron's default is the last use of a weight: in a looped model, of another loop.
        "fp8_amax_history_len": 1024,
        "fp8_amax_compute_algo": "max",
        "fp8_dot_product_attention": fp8.global_attention,
    }


def _moe_fields(
    model: ModelConfig, params_dtype: torch.dtype, is_te: bool, fp8: Fp8 | None
) -> dict[str, Any]:
    if not model.is_moe:
        return {}
    # The router of a layer runs once per loop: dividing averages its losses over the loops that
    # have them.
    aux = model.moe_aux_loss_coeff / model.choosing_loops
    z = model.moe_z_loss_coeff / model.num_loops
    return {
        "num_moe_experts": model.num_experts,
        "moe_router_topk": model.moe_top_k,
        "moe_ffn_hidden_size": model.moe_ffn_hidden_size,
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": is_te,
        "moe_permute_fusion": is_te,
        # Its kernel ignores an expert bias under softmax.
        "moe_router_fusion": is_te and model.moe_expert_bias_update_rate == 0,
        # Each expert's rows in multiples of what FP8 products need, chosen by the routing map:
        # padding them after the permutation copies all of them.
        "moe_router_padding_for_quantization": fp8 is not None,
        "moe_router_load_balancing_type": "aux_loss" if aux else "none",
        "moe_aux_loss_coeff": aux,
        "moe_z_loss_coeff": z or None,
        "moe_router_dtype": "fp64" if params_dtype == torch.float64 else "fp32",
    }
