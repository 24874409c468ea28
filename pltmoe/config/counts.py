"""Parameters, FLOPs and KV-cache bytes that follow from a model section. Pure arithmetic."""

from dataclasses import dataclass

from pltmoe.config.model import ModelConfig


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a model; ``active`` counts what one token touches, both embeddings included."""

    total: int
    active: int


def count_parameters(m: ModelConfig) -> ParameterCount:
    """Count parameters; loops share weights, so ``num_loops`` changes nothing but the gates."""
    fixed = _embedding_parameters(m) + m.hidden_size + m.num_layers * _attention_parameters(m)
    expert = 3 * m.hidden_size * (m.moe_ffn_hidden_size or m.ffn_hidden_size or 0)
    if m.num_experts is None:
        total = fixed + m.num_layers * expert
        return ParameterCount(total, total)
    fixed += m.num_layers * m.num_experts * m.hidden_size  # routers
    total = fixed + m.num_layers * m.num_experts * expert
    return ParameterCount(total, fixed + m.num_layers * (m.moe_top_k or 0) * expert)


def flops_per_token(m: ModelConfig, sequence_length: int) -> float:
    """FLOPs the model must compute per trained token: matrix products and attention, L loops.

    A multiply-add is two FLOPs; backward costs twice the forward pass. Causal attention counts the
    keys that are visible, averaged over the sequence. Recomputation is not counted (model FLOPs).
    Every loop's K and V are: Q, K and V are one product, also where later loops use loop 1's only
    (row 4 of the ablation).
    """
    qkv_out = m.head_dim * (2 * m.num_attention_heads + 2 * m.num_kv_heads) * m.hidden_size
    if m.num_experts is None:
        ffn = 3 * m.hidden_size * (m.ffn_hidden_size or 0)
    else:
        ffn = (m.moe_top_k or 0) * 3 * m.hidden_size * (m.moe_ffn_hidden_size or 0)
        ffn += m.num_experts * m.hidden_size
    linear = m.num_loops * m.num_layers * (qkv_out + ffn) + m.vocab_size * m.hidden_size
    linear += (m.num_loops - 1) * m.num_layers * _gate_weights(m)
    attention = (
        m.num_layers * m.num_attention_heads * m.head_dim * 2 * _visible_keys(m, sequence_length)
    )
    return 2 * (linear + attention) * 3


def kv_cache_bytes(m: ModelConfig, sequence_length: int, bytes_per_element: int = 2) -> int:
    """Return the KV cache of one sequence in bytes (paper, table 1).

    Loop 1 keeps every slot. A later loop keeps every slot when it attends to its own keys,
    nothing when it shares loop 1's, and the window when G-SWA is on. The L - 1 hidden vectors of
    the last slot, needed by the cross-loop shift, are counted as well.
    """
    slots = sequence_length
    if not m.share_first_loop_kv:
        slots += (m.num_loops - 1) * sequence_length
    elif m.gated_swa:
        slots += (m.num_loops - 1) * min(m.window_keys, sequence_length)
    elements = slots * m.num_layers * 2 * m.num_kv_heads * m.head_dim
    if m.cross_loop_shift:
        elements += (m.num_loops - 1) * m.hidden_size
    return elements * bytes_per_element


def _embedding_parameters(m: ModelConfig) -> int:
    return m.vocab_size * m.hidden_size * (1 if m.tied_embeddings else 2)


def _gate_weights(m: ModelConfig) -> int:
    if not m.gated_swa:
        return 0
    return m.num_attention_heads * (m.hidden_size if m.gate_use_hidden_states else m.head_dim)


def _attention_parameters(m: ModelConfig) -> int:
    projections = m.hidden_size * m.head_dim * (2 * m.num_attention_heads + 2 * m.num_kv_heads)
    norms = 2 * m.hidden_size + (2 * m.head_dim if m.qk_norm else 0)
    gate = _gate_weights(m) + (m.num_attention_heads if m.gated_swa else 0)
    return projections + norms + gate


def _visible_keys(m: ModelConfig, s: int) -> float:
    """Keys a query sees, summed over loops and averaged over the slots of a sequence."""
    causal = (s + 1) / 2
    w = min(m.window_keys, s)
    window = (w * (w + 1) / 2 + (s - w) * w) / s if m.gated_swa else 0.0
    return m.num_loops * causal + (m.num_loops - 1) * window
