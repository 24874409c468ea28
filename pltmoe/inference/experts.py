"""Mixture of experts for the few rows of a decode step: only experts in use are read.

This is the plain PyTorch version; kernels/experts.py does the same in three Triton kernels.

Letters: t rows (sequences x loops), d hidden, e experts, f expert width, r = t x top-k routed
rows sorted by expert. ``expert_te`` and ``weight_te`` hold top-k columns.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from pltmoe.model.grouped_product import fits_grouped_product

FP8 = torch.float8_e4m3fn
GROUPED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def experts(
    x_td: Tensor,
    expert_te: Tensor,
    weight_te: Tensor,
    gate_up_e2fd: Tensor,
    down_edf: Tensor,
    gate_up_scale_e2f: Tensor | None = None,
    down_scale_ed: Tensor | None = None,
) -> Tensor:
    """Return ``sum over top-k of weight * down(silu(gate(x)) * up(x))`` [t, d].

    Args:
        x_td: rows.
        expert_te: the experts of each row [t, top_k].
        weight_te: their weights [t, top_k].
        gate_up_e2fd: gate (first f rows) and up projection of every expert [e, 2f, d].
        down_edf: down projection of every expert [e, d, f].
        gate_up_scale_e2f: factors of the rows of FP8 weights (``quantize``), float32.
        down_scale_ed: likewise.
    """
    if gate_up_scale_e2f is not None and down_scale_ed is not None:
        gate_up_e2fd = dequantize(gate_up_e2fd, gate_up_scale_e2f, x_td.dtype)
        down_edf = dequantize(down_edf, down_scale_ed, x_td.dtype)
    t, top_k = expert_te.shape
    expert_r, order = expert_te.flatten().sort()
    # Not bincount: it reads its result's size back from the GPU, which a CUDA graph cannot hold.
    every = torch.arange(gate_up_e2fd.size(0), device=x_td.device, dtype=expert_r.dtype)
    ends_e = torch.searchsorted(expert_r, every, right=True, out_int32=True)
    gate, up = _product(x_td[order // top_k], gate_up_e2fd, ends_e).chunk(2, -1)
    y_rd = _product(F.silu(gate) * up, down_edf, ends_e)
    # Back in the order of the rows: a sum over top-k that does not depend on any atomic's order.
    y_tkd = torch.empty_like(y_rd).index_copy_(0, order, y_rd).view(t, top_k, -1)
    return torch.einsum("tkd,tk->td", y_tkd, weight_te.to(y_rd.dtype))


def _product(x_rd: Tensor, weight_eod: Tensor, ends_e: Tensor) -> Tensor:
    """Multiply the rows of each expert, sorted by expert, with its weight [e, out, in]."""
    if _is_grouped(x_rd, weight_eod):
        return F.grouped_mm(x_rd, weight_eod.transpose(1, 2), offs=ends_e)
    ends = ends_e.tolist()
    used = [e for e, (start, end) in enumerate(zip([0, *ends], ends, strict=False)) if end > start]
    parts = x_rd.split([ends[e] - (ends[e - 1] if e else 0) for e in used])
    return torch.cat([F.linear(x, weight_eod[e]) for e, x in zip(used, parts, strict=True)])


def _is_grouped(x_rd: Tensor, weight_eod: Tensor) -> bool:
    """Whether the library's grouped product can do it, and is worth it.

    On a CPU it calls a product for every expert, used or not.
    """
    sizes = weight_eod.shape[1:]
    if x_rd.dtype not in GROUPED_DTYPES or not fits_grouped_product(sizes, x_rd.dtype):
        return False
    return x_rd.is_cuda or 4 * x_rd.size(0) > weight_eod.size(0)


def quantize(weight_oi: Tensor) -> tuple[Tensor, Tensor]:
    """Return weights [.., out, in] in FP8 (e4m3) and each row's factor [.., out] in float32."""
    largest = torch.finfo(FP8).max
    scale_o = weight_oi.float().abs().amax(-1).clamp(min=1e-12) / largest
    return (weight_oi.float() / scale_o[..., None]).clamp(-largest, largest).to(FP8), scale_o


def dequantize(weight_eoi: Tensor, scale_eo: Tensor, dtype: torch.dtype) -> Tensor:
    """Undo ``quantize`` up to FP8's rounding."""
    return (weight_eoi.float() * scale_eo[..., None]).to(dtype)
