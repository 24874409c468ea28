"""What a row computes by itself, between attention and experts: norms, projections, RoPE, gate.

Pure functions of tensors, so that a compiler can fuse what lies between the matrix products; on a
GPU a decode step is short enough for a dozen small kernels per layer to be seen. kernels/rows.py
does ``project`` and ``choose`` in Triton.

Letters: t rows, d hidden, o rows of the fused QKV matrix, h query heads, g KV heads, k head size,
q = h * k, x input of the gate, e experts, j experts of a row (top-k).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Rope = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Sizes:
    """Numbers of a model that :func:`project` needs."""

    query_heads: int
    head_dim: int
    norm_eps: float
    gate_reads_hidden: bool


def project(
    h_td: Tensor,
    norm_d: Tensor,
    qkv_od: Tensor,
    qk_norm_hk: Tensor | None,
    gate_hx: Tensor | None,
    gate_bias_h: Tensor | None,
    rope: Rope,
    sizes: Sizes,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return q [t, h, k] and k [t, g, k] after norm and RoPE, v [t, g, k] and the gate [t, h].

    Args:
        h_td: the residual stream.
        norm_d: weight of the norm before attention.
        qkv_od: Q, K and V one after the other.
        qk_norm_hk: norm weights of all Q and K heads [h + g, k], or None.
        gate_hx: the gate's weight and, next, its bias; None without G-SWA.
        gate_bias_h: [h].
        rope: cos and sin [t, 1, k].
        sizes: of the model.
    """
    x_td = F.rms_norm(h_td, (h_td.size(-1),), norm_d, sizes.norm_eps)
    heads = F.linear(x_td, qkv_od).unflatten(-1, (-1, sizes.head_dim))
    kv_heads = (heads.size(1) - sizes.query_heads) // 2
    qk_thk, v_tgk = heads.split([sizes.query_heads + kv_heads, kv_heads], dim=1)
    if qk_norm_hk is not None:
        qk_thk = F.rms_norm(qk_thk, (sizes.head_dim,), None, sizes.norm_eps) * qk_norm_hk
    q_thk, k_tgk = rotate(qk_thk, rope).split([sizes.query_heads, kv_heads], dim=1)
    if gate_hx is None or gate_bias_h is None:
        return q_thk, k_tgk, v_tgk, None
    if sizes.gate_reads_hidden:
        logit_th = F.linear(x_td, gate_hx)
    else:
        logit_th = (q_thk * gate_hx).sum(-1)
    return q_thk, k_tgk, v_tgk, torch.sigmoid(logit_th + gate_bias_h)


def after_attention(
    h_td: Tensor,
    y_thk: Tensor,
    o_dq: Tensor,
    norm_d: Tensor,
    router_ed: Tensor | None,
    norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the residual stream with attention added, its norm, and the router's logits [t, e]."""
    h_td = h_td + F.linear(y_thk.flatten(1), o_dq)
    x_td = F.rms_norm(h_td, (h_td.size(-1),), norm_d, norm_eps)
    if router_ed is None:
        return h_td, x_td, None
    return h_td, x_td, F.linear(x_td.to(router_ed.dtype), router_ed)


def choose(
    logits_te: Tensor, bias_e: Tensor | None, top_k: int, rows_per_slot: int = 1
) -> tuple[Tensor, Tensor]:
    """Return experts [t, j] and weights [t, j] in the logits' precision.

    Args:
        logits_te: of the router.
        bias_e: decides with the probabilities which experts are chosen; not their weights.
        top_k: j.
        rows_per_slot: so many neighbouring rows are loops of one slot and follow the first.
    """
    first_te = logits_te[::rows_per_slot]
    scores = first_te if bias_e is None else first_te.softmax(-1) + bias_e
    expert_tj = scores.topk(top_k, dim=-1).indices
    if rows_per_slot > 1:
        expert_tj = expert_tj.repeat_interleave(rows_per_slot, 0)
    # Equal to the softmax over all experts, renormalised over the chosen ones.
    return expert_tj, logits_te.gather(-1, expert_tj).softmax(-1)


def rotate(x_thk: Tensor, rope: Rope) -> Tensor:
    """Apply RoPE to the two halves of each head; cos and sin are [t, 1, k]."""
    left, right = x_thk.chunk(2, dim=-1)
    return x_thk * rope[0] + torch.cat([-right, left], dim=-1) * rope[1]
