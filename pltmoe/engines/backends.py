"""Who computes what, and in FP8 or not: decided before the model is built, told at start-up."""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from pltmoe.config import RunConfig
from pltmoe.errors import ConfigError
from pltmoe.model.layer_specs import why_one_by_one
from pltmoe.model.megatron_config import Fp8
from pltmoe.runtime import devices, fp8, te_attention
from pltmoe.runtime.devices import Backend


def choose_fp8(
    config: RunConfig, impl: Backend, machine: fp8.Machine | None
) -> tuple[Fp8 | None, dict[str, fp8.Branch]]:
    """Return what runs in FP8, and what each attention branch computes in.

    Raises:
        ConfigError: FP8 is asked for and this machine cannot do it.
    """
    train, model = config.train, config.model
    if train.precision != "fp8":
        return None, {}
    if machine is None or impl.choice != "TE":
        raise ConfigError(
            f"train.precision is fp8, which needs Transformer Engine on an NVIDIA GPU: "
            f"{impl.reason}; use bf16"
        )
    if (reason := fp8.why_recipe_cannot_run(train.fp8_recipe, machine)) is not None:
        raise ConfigError(f"train.fp8_recipe: {reason}")
    branches = {
        name: _branch(config, machine, window)
        for name, window in (("global attention", False), ("local attention", True))
        if model.gated_swa or not window
    }
    in_fp8 = (branch.precision == "fp8" for branch in branches.values())
    return Fp8(train.fp8_recipe, *in_fp8), branches


def weight_gradients(config: RunConfig, impl: Backend, dtype: torch.dtype) -> Backend:
    """Say who adds up weight gradients over loops and micro batches.

    Raises:
        ConfigError: it is to happen inside the products, and no library here can do that.
    """
    if not config.train.gradient_accumulation_fusion:
        return Backend("torch", "train.gradient_accumulation_fusion is false")
    if impl.choice == "TE":
        return Backend("TE", "inside the products of its layers; head: torch")
    if (why_not := devices.why_no_apex_products(dtype)) is not None:
        raise ConfigError(
            "train.gradient_accumulation_fusion needs Transformer Engine's layers "
            f"({impl.reason}) or NVIDIA Apex's product ({why_not}): set it to false"
        )
    rest = " and head; grouped experts: torch" if config.model.is_moe else ", dense layers and head"
    return Backend("Apex", f"inside the products of attention{rest}")


def _branch(config: RunConfig, machine: fp8.Machine, window: bool) -> fp8.Branch:
    if not config.train.fp8_attention:
        return fp8.Branch("bf16", "train.fp8_attention is false")
    return fp8.attention_precision(
        config.train.fp8_recipe,
        machine,
        window=window,
        head_dim=config.model.head_dim,
        deterministic=config.train.deterministic,
    )


def backends(run: RunConfig, config: TransformerConfig, impl: Backend) -> dict[str, Backend]:
    """Say who computes what, and why; ``impl`` is the choice of ``train.transformer_impl``."""
    model = run.model
    if config.transformer_impl == "transformer_engine":
        found = _te_attention(run) | {"norm": impl, "linear layers": impl}
        if model.is_moe:
            found["experts"] = Backend("TE", "GroupedLinear: one call, a product per expert in it")
            routing = "softmax and top-k in one kernel"
            if model.moe_expert_bias_update_rate:
                routing = "top-k by torch: TE's kernel ignores an expert bias"
            found["router"] = Backend("TE", routing)
        return found
    found = {
        "attention": Backend("torch", f"scaled_dot_product_attention: {impl.reason}"),
        "norm": Backend("torch", f"rms_norm: {impl.reason}"),
    }
    if model.is_moe:
        one_by_one = why_one_by_one(config)
        how = "grouped_mm, all experts at once"
        if one_by_one is not None:
            how = f"one matrix product pair per expert: {one_by_one}"
        found["experts"] = Backend("torch", how)
    return found


def _te_attention(run: RunConfig) -> dict[str, Backend]:
    """Ask for each branch in bf16; what FP8 changes about it stands beside it."""
    m, p = run.model, run.parallel
    windows = {"global attention kernel": None}
    if m.gated_swa:
        windows["local attention kernel"] = m.window_keys
    return {
        name: te_attention.selected(
            slots=run.data.sequence_length // p.context_parallel_size,
            batch=run.train.micro_batch_size,
            heads=m.num_attention_heads // p.tensor_parallel_size,
            kv_heads=max(m.num_kv_heads // p.tensor_parallel_size, 1),
            head_dim=m.head_dim,
            window_keys=window,
            deterministic=run.train.deterministic,
        )
        for name, window in windows.items()
    }
