"""Experts of a decode step in Triton: each expert in use is read once, nothing else is.

Three launches, whose grids depend on shapes only (a CUDA graph can hold them); what varies with the
batch (``rows``) is no constant of the kernels, so that batch sizes share what is compiled:

    route     one program per expert counts its rows and lists them in blocks of BLOCK_M
    gate_up   silu(x W_gate) * (x W_up), one program per (block, columns)
    down      h W_down * routing weight, likewise; the sum over top-k follows

A block is rows of one expert, so an expert with at most BLOCK_M rows is read once. The grid has as
many blocks as there can be; those beyond the ones in use return at once. Results do not depend on
the order in which programs run: no atomics.

Letters: see ../experts.py; m rows of a block (a row is an index into the flattened [t, top_k]).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pltmoe.inference import experts as plain
from pltmoe.inference.kernels.tiles import Tiles, choose_tiles

MAX_ROUTED_ROWS = 8192
"""More (a long prefill) is bound by arithmetic: a library's grouped product of bf16 takes over."""


@triton.jit(do_not_specialize=["rows", "max_blocks"])
def _route(
    expert_ptr, block_expert_ptr, block_row_ptr, rows, max_blocks, EXPERTS: tl.constexpr,
    BINS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_M: tl.constexpr
):  # fmt: skip
    """List the rows of one expert behind the blocks of all experts before it."""
    expert = tl.program_id(0)
    bins, offset = tl.arange(0, BINS), tl.arange(0, CHUNK)
    counts = tl.zeros([BINS], tl.int32)
    for start in range(0, rows, CHUNK):
        # What pads the chunk counts as an expert after the last one.
        ids = tl.load(expert_ptr + start + offset, mask=start + offset < rows, other=EXPERTS)
        counts += tl.histogram(ids.to(tl.int32), BINS)
    blocks = (counts + BLOCK_M - 1) // BLOCK_M
    base = tl.sum(tl.where(bins < expert, blocks, 0), 0)
    count = tl.sum(tl.where(bins == expert, counts, 0), 0)
    used = (count + BLOCK_M - 1) // BLOCK_M
    for block in range(0, used):
        tl.store(block_expert_ptr + base + block, expert)
    if expert == EXPERTS - 1:
        for start in range(base + used, max_blocks, CHUNK):
            rest = start + offset
            tl.store(block_expert_ptr + rest, tl.full([CHUNK], -1, tl.int32), rest < max_blocks)
    found = 0
    for start in range(0, rows, CHUNK):
        ids = tl.load(expert_ptr + start + offset, mask=start + offset < rows, other=EXPERTS)
        mine = (ids.to(tl.int32) == expert).to(tl.int32)
        at = base * BLOCK_M + found + tl.cumsum(mine, 0) - 1
        tl.store(block_row_ptr + at, start + offset, mask=mine > 0)
        found += tl.sum(mine, 0)
    for start in range(count, used * BLOCK_M, CHUNK):
        pad = tl.full([CHUNK], 0, tl.int32) + rows
        inside = start + offset < used * BLOCK_M
        tl.store(block_row_ptr + base * BLOCK_M + start + offset, pad, mask=inside)


@triton.jit
def _widen(weight_nk, dtype: tl.constexpr):
    """Convert FP8 by way of float32: straight to bf16 costs an F2F instruction per number, at
    which Hopper is slow (triton-lang/triton#4563) beside a memory that brings 21 bytes a cycle.
    """
    if weight_nk.dtype != dtype:
        weight_nk = weight_nk.to(tl.float32).to(dtype)
    return weight_nk


@triton.jit(do_not_specialize=["rows"])
def _gate_up(
    x_ptr, weight_ptr, scale_ptr, h_ptr, block_expert_ptr, block_row_ptr, rows,
    TOP_K: tl.constexpr, D: tl.constexpr, F: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SCALED: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Compute h [rows, f] of one block of rows and BLOCK_N columns."""
    block = tl.program_id(1)
    expert = tl.load(block_expert_ptr + block).to(tl.int64)
    if expert < 0:
        return
    row_m = tl.load(block_row_ptr + block * BLOCK_M + tl.arange(0, BLOCK_M))
    column_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    x_at = x_ptr + (row_m // TOP_K)[:, None] * D + inner[None, :]
    gate_at = weight_ptr + expert * (2 * F * D) + column_n[:, None] * D + inner[None, :]
    x_in, w_in = (row_m < rows)[:, None], (column_n < F)[:, None]
    gate_mn = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up_mn = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, D, BLOCK_K):
        left = (start + inner < D)[None, :]
        x_mk = tl.load(x_at + start, mask=x_in & left, other=0.0)
        # Weights pass by once; what stays in the cache should be the activations.
        gate_nk = tl.load(
            gate_at + start, mask=w_in & left, other=0.0, eviction_policy="evict_first"
        )
        up_nk = tl.load(
            gate_at + F * D + start, mask=w_in & left, other=0.0, eviction_policy="evict_first"
        )
        gate_nk, up_nk = _widen(gate_nk, x_mk.dtype), _widen(up_nk, x_mk.dtype)
        gate_mn = tl.dot(x_mk, tl.trans(gate_nk), gate_mn, input_precision=PRECISION)
        up_mn = tl.dot(x_mk, tl.trans(up_nk), up_mn, input_precision=PRECISION)
    if SCALED:
        scale_at = scale_ptr + expert * (2 * F) + column_n
        gate_mn *= tl.load(scale_at, mask=column_n < F, other=0.0)[None, :]
        up_mn *= tl.load(scale_at + F, mask=column_n < F, other=0.0)[None, :]
    h_mn = gate_mn / (1 + tl.exp(-gate_mn)) * up_mn
    h_at = h_ptr + row_m[:, None] * F + column_n[None, :]
    tl.store(h_at, h_mn.to(h_ptr.dtype.element_ty), mask=x_in & (column_n < F)[None, :])


@triton.jit(do_not_specialize=["rows"])
def _down(
    h_ptr, weight_ptr, scale_ptr, routing_ptr, y_ptr, block_expert_ptr, block_row_ptr, rows,
    D: tl.constexpr, F: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, SCALED: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Compute y [rows, d], each row times its routing weight."""
    block = tl.program_id(1)
    expert = tl.load(block_expert_ptr + block).to(tl.int64)
    if expert < 0:
        return
    row_m = tl.load(block_row_ptr + block * BLOCK_M + tl.arange(0, BLOCK_M))
    column_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    h_at = h_ptr + row_m[:, None] * F + inner[None, :]
    down_at = weight_ptr + expert * (D * F) + column_n[:, None] * F + inner[None, :]
    h_in, w_in = (row_m < rows)[:, None], (column_n < D)[:, None]
    y_mn = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, F, BLOCK_K):
        left = (start + inner < F)[None, :]
        h_mk = tl.load(h_at + start, mask=h_in & left, other=0.0)
        down_nk = tl.load(
            down_at + start, mask=w_in & left, other=0.0, eviction_policy="evict_first"
        )
        down_nk = _widen(down_nk, h_mk.dtype)
        y_mn = tl.dot(h_mk, tl.trans(down_nk), y_mn, input_precision=PRECISION)
    if SCALED:
        scale_n = tl.load(scale_ptr + expert * D + column_n, mask=column_n < D, other=0.0)
        y_mn *= scale_n[None, :]
    y_mn *= tl.load(routing_ptr + row_m, mask=row_m < rows, other=0.0).to(tl.float32)[:, None]
    y_at = y_ptr + row_m[:, None] * D + column_n[None, :]
    tl.store(y_at, y_mn.to(y_ptr.dtype.element_ty), mask=h_in & (column_n < D)[None, :])


def experts(
    x_td: Tensor,
    expert_te: Tensor,
    weight_te: Tensor,
    gate_up_e2fd: Tensor,
    down_edf: Tensor,
    gate_up_scale_e2f: Tensor | None = None,
    down_scale_ed: Tensor | None = None,
    tiles: Tiles | None = None,
) -> Tensor:
    """Do what ``pltmoe.inference.experts.experts`` does, in three kernels and a sum.

    ``tiles`` follow from the shapes when None.
    """
    (t, top_k), d, f = expert_te.shape, x_td.size(1), down_edf.size(2)
    rows, e = t * top_k, down_edf.size(0)
    if rows > MAX_ROUTED_ROWS and gate_up_e2fd.dtype == torch.bfloat16:
        return plain.experts(x_td, expert_te, weight_te, gate_up_e2fd, down_edf)
    tiles = tiles or choose_tiles(rows, e)
    x_td = x_td.contiguous()
    assert gate_up_e2fd.is_contiguous() and down_edf.is_contiguous()
    m, size = tiles.block_m, x_td.element_size()
    blocks = min(e, rows) + rows // m
    index = torch.empty(blocks * (1 + m), dtype=torch.int32, device=x_td.device)
    # Rows lie first, so that both begin at a multiple of 16 bytes whatever the number of blocks.
    listed = index[blocks * m :], index[: blocks * m]
    # As many entries per chunk as threads or more: a histogram must not see one twice.
    chunk = min(max(triton.next_power_of_2(rows), 128), 1024)
    bins = max(triton.next_power_of_2(e + 1), 128)
    _route[(e,)](
        expert_te.contiguous(), *listed, rows, blocks, EXPERTS=e, BINS=bins, CHUNK=chunk,
        BLOCK_M=m, num_warps=4,
    )  # fmt: skip
    h_rf, y_rd = x_td.new_empty(rows, f), x_td.new_empty(rows, d)
    how = {"BLOCK_M": m, "PRECISION": "ieee" if x_td.dtype == torch.float32 else "tf32"}
    how["SCALED"] = gate_up_scale_e2f is not None
    _gate_up[(triton.cdiv(f, tiles.gate_up.block_n), blocks)](
        x_td, gate_up_e2fd, gate_up_scale_e2f, h_rf, *listed, rows, TOP_K=top_k, D=d, F=f,
        **tiles.gate_up.arguments(size), **how
    )  # fmt: skip
    _down[(triton.cdiv(d, tiles.down.block_n), blocks)](
        h_rf, down_edf, down_scale_ed, weight_te.contiguous(), y_rd, *listed, rows, D=d, F=f,
        **tiles.down.arguments(size), **how
    )  # fmt: skip
    return y_rd.view(t, top_k, d).sum(1)
