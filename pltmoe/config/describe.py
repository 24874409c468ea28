"""A model in words: the names that people use, for tags and reports."""

from pltmoe.config.model import ModelConfig


def variant(m: ModelConfig) -> str:
    """Return the row of the paper's ablation that a model is: vanilla, loop-2, loop-2 + CLP, ..."""
    if m.moe_loop_routing == "shared":  # not the paper's
        own = m.model_copy(update={"moe_loop_routing": "independent"})
        return f"{variant(own)}, shared routing"
    if m.num_loops == 1:
        return "vanilla"
    if m.cross_loop_shift and m.share_first_loop_kv and m.gated_swa:
        return f"PLT-{m.num_loops}"
    parts = {"CLP": m.cross_loop_shift, "shared KV": m.share_first_loop_kv, "G-SWA": m.gated_swa}
    return " + ".join([f"loop-{m.num_loops}", *(name for name, on in parts.items() if on)])


def describe_model(m: ModelConfig) -> str:
    """Return one line: layers and loops, what happens between them, experts."""
    layers = (
        f"{m.num_loops} x {m.num_layers} layers" if m.num_loops > 1 else f"{m.num_layers} layers"
    )
    flags = {"shift": m.cross_loop_shift, "shared KV": m.share_first_loop_kv, "G-SWA": m.gated_swa}
    words = [layers, *(name for name, on in flags.items() if on)]
    words += ["norm per loop"] if m.normalize_per_loop else []
    words += [f"{m.num_experts} experts, top-{m.moe_top_k}" if m.is_moe else "dense"]
    words += ["shared routing"] if m.moe_loop_routing == "shared" else []
    return ", ".join(words)
