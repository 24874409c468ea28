"""What lies between the matrix products of a decode step, in Triton: three launches a layer.

    heads     norm and RoPE of every Q and K head in place, and the gate
    store     keys and values into the cache, those of later loops into their rings
    choose    the experts of every row and their weights

Each does what a plain function does in two to eleven launches, which take longer to start than to
run; six of them only models with a gate and rings had.

Letters: see ../rows.py; c half a head, b sequences, L loops, n slots, w slots of a ring, j experts
of a row.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from pltmoe.inference.rows import Rope, Sizes


@triton.jit
def _heads(
    qkv_ptr, norm_ptr, cos_ptr, sin_ptr, gate_weight_ptr, gate_bias_ptr, gate_ptr, eps, stride_t,
    H: tl.constexpr, QK: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
    NORM: tl.constexpr, GATE: tl.constexpr
):  # fmt: skip
    """One program per row and head of Q and K."""
    row, head = (tl.program_id(0) // QK).to(tl.int64), tl.program_id(0) % QK
    c = tl.arange(0, BLOCK)
    inside = c < HALF
    at = qkv_ptr + row * stride_t + head * (2 * HALF) + c
    left_c = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    right_c = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        norm_at = norm_ptr + head * (2 * HALF) + c
        mean = tl.sum(left_c * left_c + right_c * right_c, 0) / (2 * HALF)
        scale = 1 / tl.sqrt(mean + eps)
        left_c *= scale * tl.load(norm_at, mask=inside, other=0.0).to(tl.float32)
        right_c *= scale * tl.load(norm_at + HALF, mask=inside, other=0.0).to(tl.float32)
    # Both halves of the angles are the same.
    cos_c = tl.load(cos_ptr + row * (2 * HALF) + c, mask=inside, other=0.0).to(tl.float32)
    sin_c = tl.load(sin_ptr + row * (2 * HALF) + c, mask=inside, other=0.0).to(tl.float32)
    new_left_c = left_c * cos_c - right_c * sin_c
    new_right_c = right_c * cos_c + left_c * sin_c
    tl.store(at, new_left_c.to(qkv_ptr.dtype.element_ty), mask=inside)
    tl.store(at + HALF, new_right_c.to(qkv_ptr.dtype.element_ty), mask=inside)
    if GATE:
        if head < H:
            weight_at = gate_weight_ptr + head * (2 * HALF) + c
            left_c = tl.load(weight_at, mask=inside, other=0.0).to(tl.float32) * new_left_c
            right_c = tl.load(weight_at + HALF, mask=inside, other=0.0).to(tl.float32) * new_right_c
            logit = tl.sum(left_c + right_c, 0) + tl.load(gate_bias_ptr + head).to(tl.float32)
            gate = 1 / (1 + tl.exp(-logit))
            tl.store(gate_ptr + row * H + head, gate.to(gate_ptr.dtype.element_ty))


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
    """Do what ``pltmoe.inference.rows.project`` does; q, k and v are parts of one product."""
    x_td = F.rms_norm(h_td, (h_td.size(-1),), norm_d, sizes.norm_eps)
    qkv_to = F.linear(x_td, qkv_od)
    h, k = sizes.query_heads, sizes.head_dim
    heads = qkv_to.unflatten(-1, (-1, k))
    g = (heads.size(1) - h) // 2
    gate_th, of_query = None, gate_hx is not None and not sizes.gate_reads_hidden
    if gate_hx is not None:
        gate_th = x_td.new_empty(x_td.size(0), h)
    _heads[(x_td.size(0) * (h + g),)](
        qkv_to, qk_norm_hk, rope[0].contiguous(), rope[1].contiguous(), gate_hx, gate_bias_h,
        gate_th, sizes.norm_eps, qkv_to.stride(0), H=h, QK=h + g, HALF=k // 2,
        BLOCK=triton.next_power_of_2(k // 2), NORM=qk_norm_hk is not None, GATE=of_query,
        num_warps=1,
    )  # fmt: skip
    if gate_hx is not None and gate_bias_h is not None and not of_query:
        gate_th = torch.sigmoid(F.linear(x_td, gate_hx) + gate_bias_h)
    q_thk, k_tgk, v_tgk = heads.split([h, g, g], 1)
    return q_thk, k_tgk, v_tgk, gate_th


@triton.jit
def _store(
    k_ptr, v_ptr, to_k_ptr, to_v_ptr, slot_ptr, ring_k_ptr, ring_v_ptr, ring_slot_ptr, stride_kb,
    stride_kl, stride_kg, stride_vb, stride_vl, stride_vg, stride_tb, stride_tg, stride_tn,
    stride_rb, stride_rl, stride_rg, stride_rn, L: tl.constexpr, G: tl.constexpr, K: tl.constexpr,
    BLOCK_K: tl.constexpr
):  # fmt: skip
    """One program per KV head of a row."""
    program = tl.program_id(0).to(tl.int64)
    row, group = program // G, program % G
    sequence, loop = row // L, row % L
    head = tl.arange(0, BLOCK_K)
    inside = head < K
    k_at = k_ptr + sequence * stride_kb + loop * stride_kl + group * stride_kg + head
    v_at = v_ptr + sequence * stride_vb + loop * stride_vl + group * stride_vg + head
    k_k, v_k = tl.load(k_at, mask=inside), tl.load(v_at, mask=inside)
    if loop == 0:
        slot = tl.load(slot_ptr + sequence).to(tl.int64)
        at = sequence * stride_tb + group * stride_tg + slot * stride_tn
        tl.store(to_k_ptr + at + head, k_k, mask=inside)
        tl.store(to_v_ptr + at + head, v_k, mask=inside)
    else:
        slot = tl.load(ring_slot_ptr + sequence).to(tl.int64)
        at = sequence * stride_rb + (loop - 1) * stride_rl + group * stride_rg + slot * stride_rn
        tl.store(ring_k_ptr + at + head, k_k, mask=inside)
        tl.store(ring_v_ptr + at + head, v_k, mask=inside)


def store(
    k_bLgk: Tensor,
    v_bLgk: Tensor,
    to_k_bgnk: Tensor,
    to_v_bgnk: Tensor,
    slot_b: Tensor,
    ring_k_blgwk: Tensor | None = None,
    ring_v_blgwk: Tensor | None = None,
    ring_slot_b: Tensor | None = None,
) -> None:
    """Do what ``pltmoe.inference.cache.store`` does in one kernel."""
    b, L, g, k = k_bLgk.shape
    if ring_k_blgwk is None or ring_v_blgwk is None:
        L = 1  # rings are never written then, but a kernel's argument is a tensor
        ring_k_blgwk, ring_v_blgwk = to_k_bgnk.unsqueeze(1), to_v_bgnk.unsqueeze(1)
        ring_slot_b = slot_b
    assert to_k_bgnk.stride() == to_v_bgnk.stride()
    assert ring_k_blgwk.stride() == ring_v_blgwk.stride()
    _store[(b * L * g,)](
        k_bLgk, v_bLgk, to_k_bgnk, to_v_bgnk, slot_b, ring_k_blgwk, ring_v_blgwk, ring_slot_b,
        *k_bLgk.stride()[:3], *v_bLgk.stride()[:3], *to_k_bgnk.stride()[:3],
        *ring_k_blgwk.stride()[:4], L=L, G=g, K=k, BLOCK_K=triton.next_power_of_2(k), num_warps=1,
    )  # fmt: skip


@triton.jit
def _choose(
    logits_ptr, bias_ptr, expert_ptr, weight_ptr, EXPERTS: tl.constexpr, BINS: tl.constexpr,
    TOP_K: tl.constexpr, BLOCK_J: tl.constexpr, ROWS_PER_SLOT: tl.constexpr, BIAS: tl.constexpr
):  # fmt: skip
    """One program per row: the largest of its slot's first row, again and again."""
    row = tl.program_id(0).to(tl.int64)
    e, j = tl.arange(0, BINS), tl.arange(0, BLOCK_J)
    first_at = logits_ptr + row // ROWS_PER_SLOT * ROWS_PER_SLOT * EXPERTS + e
    score_e = tl.load(first_at, mask=e < EXPERTS, other=float("-inf"))
    if BIAS:
        score_e = tl.exp(score_e - tl.max(score_e, 0))
        score_e = score_e / tl.sum(score_e, 0) + tl.load(bias_ptr + e, mask=e < EXPERTS, other=0.0)
        score_e = tl.where(e < EXPERTS, score_e, float("-inf"))
    expert_j = tl.zeros([BLOCK_J], tl.int32)
    for i in range(TOP_K):
        best = tl.minimum(tl.argmax(score_e, 0), EXPERTS - 1)  # without numbers: some expert
        expert_j = tl.where(j == i, best, expert_j)
        score_e = tl.where(e == best, float("-inf"), score_e)
    own_at = logits_ptr + row * EXPERTS + expert_j
    own_j = tl.load(own_at, mask=j < TOP_K, other=float("-inf"))
    weight_j = tl.exp(own_j - tl.max(own_j, 0))
    at_j = row * TOP_K + j
    tl.store(expert_ptr + at_j, expert_j.to(tl.int64), mask=j < TOP_K)
    tl.store(weight_ptr + at_j, weight_j / tl.sum(weight_j, 0), mask=j < TOP_K)


def choose(
    logits_te: Tensor, bias_e: Tensor | None, top_k: int, rows_per_slot: int = 1
) -> tuple[Tensor, Tensor]:
    """Do what ``pltmoe.inference.rows.choose`` does in one kernel."""
    t, e = logits_te.shape
    expert_tj = torch.empty(t, top_k, dtype=torch.int64, device=logits_te.device)
    weight_tj = logits_te.new_empty(t, top_k)
    _choose[(t,)](
        logits_te.contiguous(), bias_e, expert_tj, weight_tj, EXPERTS=e,
        BINS=triton.next_power_of_2(e), TOP_K=top_k, BLOCK_J=triton.next_power_of_2(top_k),
        ROWS_PER_SLOT=rows_per_slot, BIAS=bias_e is not None, num_warps=1,
    )  # fmt: skip
    return expert_tj, weight_tj
