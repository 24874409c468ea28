"""Fused decode attention in Triton: all loops over loop 1's cache, the windows, and the gate.

The L x h/g query rows of one KV head form one tile, so a key is read once for all loops. With
enough sequences one program does everything for a KV head of a sequence; with few, the cache is
cut into splits (flash-decoding) and every window is a split of its own:

    programs of one KV head:  | keys 0..c | keys c..2c | ... | window, loop 2 | window, loop 3 |
    second kernel:            softmax over the key splits, then g * window + (1 - g) * global

Everything that varies from step to step (lengths) is read on the device: the launch is the same
for every step, as a CUDA graph needs it. The number of splits is no constant of the kernels: every
batch and cache size has another, and would wait for its own compilation. Letters: see
../attention.py. Rows are padded to 16, the least that a tensor core takes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = 1.4426950408889634
BLOCK_BYTES = 16 * 1024
"""Of one block of keys. Several wait in shared memory, with their values and the query tile, and
devices of compute capability 8.6, 8.9 and 12.0 have 99 KiB of that."""
KEYS_PER_SPLIT = 128
MOST_SPLITS = 64
"""More do not fit the registers of the program that joins them."""


@triton.jit
def _attend(
    q_qk, scale, k_ptr, v_ptr, stride_k, stride_v, first, last, K: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Softmax of base 2 over slots first .. last: unnormalised sum, maximum, denominator."""
    top_q = tl.full([ROWS], float("-inf"), tl.float32)
    sum_q = tl.zeros([ROWS], tl.float32)
    acc_qk = tl.zeros([ROWS, BLOCK_K], tl.float32)
    head = tl.arange(0, BLOCK_K)
    for start in range(first, last, BLOCK_N):
        slot = start + tl.arange(0, BLOCK_N)
        seen = (slot < last)[:, None] & (head < K)[None, :]
        k_nk = tl.load(k_ptr + slot[:, None] * stride_k + head[None, :], mask=seen, other=0.0)
        v_nk = tl.load(v_ptr + slot[:, None] * stride_v + head[None, :], mask=seen, other=0.0)
        score_qn = tl.dot(q_qk, tl.trans(k_nk), input_precision=PRECISION) * scale
        score_qn = tl.where((slot < last)[None, :], score_qn, float("-inf"))
        new_q = tl.maximum(top_q, tl.max(score_qn, 1))
        p_qn = tl.exp2(score_qn - new_q[:, None])
        shrink_q = tl.exp2(top_q - new_q)
        sum_q = sum_q * shrink_q + tl.sum(p_qn, 1)
        acc_qk = acc_qk * shrink_q[:, None]
        acc_qk = tl.dot(p_qn.to(v_nk.dtype), v_nk, acc_qk, input_precision=PRECISION)
        top_q = new_q
    return acc_qk, top_q, sum_q


@triton.jit
def _load_rows(
    q_ptr, sequence, group, stride_qb, stride_ql, stride_qh, L: tl.constexpr,
    PER: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """Return the query tile of one KV head, and loop, head and validity of each row."""
    row = tl.arange(0, ROWS)
    head = tl.arange(0, BLOCK_K)
    loop, query_head, valid = row // PER, group * PER + row % PER, row < L * PER
    where_q = q_ptr + sequence * stride_qb + loop * stride_ql + query_head * stride_qh
    mask = valid[:, None] & (head < K)[None, :]
    q_qk = tl.load(where_q[:, None] + head[None, :], mask=mask, other=0.0)
    return q_qk, loop, query_head, mask


@triton.jit
def _one_pass(
    q_ptr, k_ptr, v_ptr, lengths_ptr, wk_ptr, wv_ptr, window_lengths_ptr, gate_ptr,
    y_ptr, scale, stride_qb, stride_ql, stride_qh, stride_kb, stride_kg, stride_kn, stride_vb,
    stride_vg, stride_vn, stride_wb, stride_wl, stride_wg, stride_wn, stride_ub, stride_ul,
    stride_ug, stride_un, stride_gb, stride_gl, stride_gh, G: tl.constexpr, L: tl.constexpr,
    PER: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr, WINDOWS: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """One program per KV head of a sequence: cache, windows and gate."""
    program = tl.program_id(0).to(tl.int64)
    sequence, group = program // G, program % G
    q_qk, loop, query_head, mask = _load_rows(
        q_ptr, sequence, group, stride_qb, stride_ql, stride_qh, L, PER, K, BLOCK_K, ROWS
    )
    last = tl.load(lengths_ptr + sequence).to(tl.int32)
    y_qk, top_q, sum_q = _attend(
        q_qk, scale, k_ptr + sequence * stride_kb + group * stride_kg,
        v_ptr + sequence * stride_vb + group * stride_vg, stride_kn, stride_vn, 0, last,
        K, BLOCK_K, BLOCK_N, ROWS, PRECISION
    )  # fmt: skip
    y_qk = y_qk / sum_q[:, None]
    if WINDOWS:
        used = tl.load(window_lengths_ptr + sequence).to(tl.int32)
        gate_at = gate_ptr + sequence * stride_gb + loop * stride_gl + query_head * stride_gh
        gate_q = tl.load(gate_at, mask=(loop > 0) & (loop < L), other=0.0).to(tl.float32)
        for later in tl.static_range(1, L):
            w_qk, top_q, sum_q = _attend(
                q_qk, scale,
                wk_ptr + sequence * stride_wb + (later - 1) * stride_wl + group * stride_wg,
                wv_ptr + sequence * stride_ub + (later - 1) * stride_ul + group * stride_ug,
                stride_wn, stride_un, 0, used, K, BLOCK_K, BLOCK_N, ROWS, PRECISION
            )  # fmt: skip
            share_q = tl.where(loop == later, gate_q, 0.0)[:, None]
            y_qk = share_q * (w_qk / sum_q[:, None]) + (1 - share_q) * y_qk
    head = tl.arange(0, BLOCK_K)
    at_q = ((sequence * L + loop) * (G * PER) + query_head) * K
    tl.store(y_ptr + at_q[:, None] + head[None, :], y_qk.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["splits"])
def _split(
    q_ptr, k_ptr, v_ptr, lengths_ptr, wk_ptr, wv_ptr, window_lengths_ptr, acc_ptr,
    top_ptr, sum_ptr, splits, scale, stride_qb, stride_ql, stride_qh, stride_kb, stride_kg,
    stride_kn, stride_vb, stride_vg, stride_vn, stride_wb, stride_wl, stride_wg, stride_wn,
    stride_ub, stride_ul, stride_ug, stride_un, G: tl.constexpr, L: tl.constexpr,
    PER: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """One program per KV head and split; parts from ``splits`` on are the later loops' windows."""
    program = tl.program_id(0).to(tl.int64)
    sequence, group = program // G, program % G
    part, parts = tl.program_id(1), tl.num_programs(1)
    q_qk, loop, query_head, mask = _load_rows(
        q_ptr, sequence, group, stride_qb, stride_ql, stride_qh, L, PER, K, BLOCK_K, ROWS
    )
    if part < splits:
        k_at = k_ptr + sequence * stride_kb + group * stride_kg
        v_at = v_ptr + sequence * stride_vb + group * stride_vg
        stride_k, stride_v = stride_kn, stride_vn
        last = tl.load(lengths_ptr + sequence).to(tl.int32)
        keys = tl.cdiv(tl.cdiv(last, splits), BLOCK_N) * BLOCK_N
        first = part * keys
        last = tl.minimum(first + keys, last)
    else:
        later = part - splits
        k_at = wk_ptr + sequence * stride_wb + later * stride_wl + group * stride_wg
        v_at = wv_ptr + sequence * stride_ub + later * stride_ul + group * stride_ug
        stride_k, stride_v = stride_wn, stride_un
        first = 0
        last = tl.load(window_lengths_ptr + sequence).to(tl.int32)
    acc_qk, top_q, sum_q = _attend(
        q_qk, scale, k_at, v_at, stride_k, stride_v, first, last, K, BLOCK_K, BLOCK_N, ROWS,
        PRECISION
    )  # fmt: skip
    row = tl.arange(0, ROWS)
    at_q = (tl.program_id(0).to(tl.int64) * parts + part) * ROWS + row
    tl.store(top_ptr + at_q, top_q)
    tl.store(sum_ptr + at_q, sum_q)
    head = tl.arange(0, BLOCK_K)
    tl.store(acc_ptr + at_q[:, None] * BLOCK_K + head[None, :], acc_qk, (loop < L)[:, None])


@triton.jit(do_not_specialize=["splits", "parts"])
def _combine(
    acc_ptr, top_ptr, sum_ptr, gate_ptr, y_ptr, splits, parts, stride_gb, stride_gl, stride_gh,
    BLOCK_S: tl.constexpr, G: tl.constexpr, L: tl.constexpr, PER: tl.constexpr, K: tl.constexpr,
    BLOCK_K: tl.constexpr, ROWS: tl.constexpr, WINDOWS: tl.constexpr
):  # fmt: skip
    """One program per query row: join its splits, then mix in its window."""
    program = tl.program_id(0)
    sequence, rest = (program // (L * G * PER)).to(tl.int64), program % (L * G * PER)
    loop, query_head = rest // (G * PER), rest % (G * PER)
    row = loop * PER + query_head % PER
    part, head = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_K)
    base = (sequence * G + query_head // PER) * parts
    at_s = (base + part) * ROWS + row
    top_s = tl.load(top_ptr + at_s, mask=part < splits, other=float("-inf"))
    scale_s = tl.exp2(top_s - tl.max(top_s, 0))
    sum_s = tl.load(sum_ptr + at_s, mask=part < splits, other=0.0)
    acc_at = acc_ptr + at_s[:, None] * BLOCK_K + head[None, :]
    acc_sk = tl.load(acc_at, mask=(part < splits)[:, None], other=0.0)
    y_k = tl.sum(acc_sk * scale_s[:, None], 0) / tl.sum(sum_s * scale_s, 0)
    if WINDOWS:
        if loop > 0:
            at = (base + splits + loop - 1) * ROWS + row
            local_k = tl.load(acc_ptr + at * BLOCK_K + head) / tl.load(sum_ptr + at)
            gate_at = gate_ptr + sequence * stride_gb + loop * stride_gl + query_head * stride_gh
            gate = tl.load(gate_at).to(tl.float32)
            y_k = gate * local_k + (1 - gate) * y_k
    at_y = (sequence * (L * G * PER) + rest) * K + head
    tl.store(y_ptr + at_y, y_k.to(y_ptr.dtype.element_ty), mask=head < K)


def decode_attention(
    q_bLhk: Tensor,
    k_bgnk: Tensor,
    v_bgnk: Tensor,
    lengths_b: Tensor,
    window_k_bLgwk: Tensor | None = None,
    window_v_bLgwk: Tensor | None = None,
    window_lengths_b: Tensor | None = None,
    gate_bLh: Tensor | None = None,
    splits: int | None = None,
) -> Tensor:
    """Do what ``pltmoe.inference.attention.decode_attention`` does, in one or two kernels.

    Every tensor's last dimension is contiguous. ``splits`` (programs per KV head of a sequence)
    follows from the shapes when it is None; lengths are never read back.
    """
    b, L, h, k = q_bLhk.shape
    g, n = k_bgnk.shape[1:3]
    windows = window_k_bLgwk is not None and L > 1
    if not windows:  # never read, but a kernel's argument is a tensor
        window_k_bLgwk, window_v_bLgwk = k_bgnk.unsqueeze(1), v_bgnk.unsqueeze(1)
        window_lengths_b, gate_bLh = lengths_b, q_bLhk[..., 0]
    assert window_k_bLgwk is not None and window_v_bLgwk is not None and gate_bLh is not None
    y_bLhk = torch.empty(b, L, h, k, dtype=q_bLhk.dtype, device=q_bLhk.device)
    inputs = (
        q_bLhk, k_bgnk, v_bgnk, lengths_b,
        window_k_bLgwk, window_v_bLgwk, window_lengths_b,
    )  # fmt: skip
    strides = (
        *q_bLhk.stride()[:3], *k_bgnk.stride()[:3], *v_bgnk.stride()[:3],
        *window_k_bLgwk.stride()[:4], *window_v_bLgwk.stride()[:4],
    )  # fmt: skip
    sizes = {
        "G": g, "L": L, "PER": h // g, "K": k, "BLOCK_K": max(16, triton.next_power_of_2(k)),
        "ROWS": max(16, triton.next_power_of_2(L * h // g)),
    }  # fmt: skip
    how: dict[str, int | str] = {**tile(sizes["BLOCK_K"], q_bLhk.element_size())}
    how["PRECISION"] = "ieee" if q_bLhk.dtype == torch.float32 else "tf32"
    scale = LOG2_E * k**-0.5
    splits = splits or choose_splits(b * g, n, _processors(q_bLhk.device))
    if splits == 1:
        _one_pass[(b * g,)](
            *inputs, gate_bLh, y_bLhk, scale, *strides, *gate_bLh.stride(), WINDOWS=windows,
            **sizes, **how
        )  # fmt: skip
        return y_bLhk
    parts = splits + (L - 1 if windows else 0)
    shape = (b * g, parts, sizes["ROWS"])
    top, total = q_bLhk.new_empty((2, *shape), dtype=torch.float32)
    acc = q_bLhk.new_empty((*shape, sizes["BLOCK_K"]), dtype=torch.float32)
    _split[(b * g, parts)](*inputs, acc, top, total, splits, scale, *strides, **sizes, **how)
    _combine[(b * L * h,)](
        acc, top, total, gate_bLh, y_bLhk, splits, parts, *gate_bLh.stride(),
        BLOCK_S=triton.next_power_of_2(splits), WINDOWS=windows, **sizes, num_warps=2
    )  # fmt: skip
    return y_bLhk


def tile(block_k: int, element_size: int) -> dict[str, int]:
    """Return keys of a block, warps and stages that fit a device with little shared memory.

    ``block_k`` is the padded head size, ``element_size`` in bytes.
    """
    row = block_k * element_size
    keys = max(16, min(64, BLOCK_BYTES // row))  # 16 is the least that a tensor core takes
    stages = 3 if element_size <= 2 and keys == 64 else 2
    return {"BLOCK_N": keys, "num_warps": 4, "num_stages": stages}


def choose_splits(heads: int, n: int, processors: int) -> int:
    """Return programs per KV head of a sequence: two in flight per processor, not too short.

    ``heads`` is sequences x KV heads, ``n`` the capacity of the cache in slots.
    """
    wanted = round(2 * processors / heads)
    return max(1, min(wanted, triton.cdiv(n, KEYS_PER_SPLIT), MOST_SPLITS))


def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1  # the interpreter runs one program after another
    return torch.cuda.get_device_properties(device).multi_processor_count
