"""Who computes what: for the start-up block and the tags of a run."""

from megatron.core.transformer.transformer_config import TransformerConfig

from pltmoe.config import ModelConfig
from pltmoe.model.layer_specs import why_one_by_one
from pltmoe.runtime.devices import Backend


def backends(model: ModelConfig, config: TransformerConfig, impl: Backend) -> dict[str, Backend]:
    """Say who computes what, and why; ``impl`` is the choice of ``train.transformer_impl``."""
    if config.transformer_impl == "transformer_engine":
        found = {
            "attention": Backend("TE", "DotProductAttention, another one for the window"),
            "norm": impl,
            "linear layers": impl,
        }
        if model.is_moe:
            found["experts"] = Backend("TE", "GroupedLinear, all experts at once")
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
