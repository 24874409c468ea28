"""Attention of one decoded slot: all loops read loop 1's cache in one call, then their windows.

This is the plain PyTorch version; kernels/decode_attention.py does the same in Triton: in one
kernel, or in two where the cache is split.

Letters: b sequences, L loops, h query heads, g KV heads, k head size, n slots of the cache,
w slots of a later loop's window, q query rows of one KV head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from pltmoe.model.sdpa import without_cudnn


@without_cudnn()
def decode_attention(
    q_bLhk: Tensor,
    k_bgnk: Tensor,
    v_bgnk: Tensor,
    lengths_b: Tensor,
    window_k_bLgwk: Tensor | None = None,
    window_v_bLgwk: Tensor | None = None,
    window_lengths_b: Tensor | None = None,
    gate_bLh: Tensor | None = None,
) -> Tensor:
    """Attend from the L rows of one slot per sequence; rows of later loops mix in their window.

    Args:
        q_bLhk: queries after norm and RoPE; row 0 is loop 1.
        k_bgnk: loop 1's keys, this slot's included; strides are free, the last one is 1.
        v_bgnk: loop 1's values.
        lengths_b: slots of the cache that are in use, this one included (int32 or int64).
        window_k_bLgwk: keys of the loops after the first, ``[b, L-1, g, w, k]``, in any order;
            the current slot's included. None without G-SWA: every row only reads the cache.
        window_v_bLgwk: their values.
        window_lengths_b: entries of the window in use: the first so many.
        gate_bLh: g of all loops, ``[b, L, h]``; row 0 is not read.

    Returns:
        y ``[b, L, h, k]``: ``g * local + (1 - g) * global`` for later loops, global for loop 1.
    """
    y_bLhk = _global(q_bLhk, k_bgnk, v_bgnk, lengths_b)
    if window_k_bLgwk is None or q_bLhk.size(1) == 1:
        return y_bLhk
    assert window_v_bLgwk is not None and window_lengths_b is not None and gate_bLh is not None
    local = _local(q_bLhk[:, 1:], window_k_bLgwk, window_v_bLgwk, window_lengths_b)
    mixed = torch.lerp(y_bLhk[:, 1:], local, gate_bLh[:, 1:, :, None].to(local.dtype))
    return torch.cat([y_bLhk[:, :1], mixed], 1)


def _global(q_bLhk: Tensor, k_bgnk: Tensor, v_bgnk: Tensor, lengths_b: Tensor) -> Tensor:
    b, L, h, k = q_bLhk.shape
    g = k_bgnk.size(1)
    # The loops join the query heads of their KV head, so that a key is read once for all of them.
    q_bgqk = q_bLhk.reshape(b, L, g, h // g, k).transpose(1, 2).reshape(b, g, L * h // g, k)
    last, mask = _visible(k_bgnk.size(2), lengths_b)
    keys, values = k_bgnk[:, :, :last], v_bgnk[:, :, :last]
    y_bgqk = F.scaled_dot_product_attention(q_bgqk, keys, values, attn_mask=mask)
    return y_bgqk.view(b, g, L, h // g, k).transpose(1, 2).reshape(b, L, h, k)


def _visible(n: int, lengths_b: Tensor) -> tuple[int, Tensor | None]:
    """Return how many slots to read and a mask [b, 1, 1, slots], None where all are seen.

    On a GPU nothing is read back: all ``n`` slots are masked.
    """
    if lengths_b.device.type == "cpu":
        ends = lengths_b.tolist()
        n = max(ends)
        if min(ends) == n:
            return n, None
    mask = torch.arange(n, device=lengths_b.device) < lengths_b[:, None]
    return n, mask[:, None, None]


def _local(q_bLhk: Tensor, k_bLgwk: Tensor, v_bLgwk: Tensor, lengths_b: Tensor) -> Tensor:
    b, L, h, k = q_bLhk.shape
    g = k_bLgwk.size(2)
    last, mask = _visible(k_bLgwk.size(3), lengths_b)
    q = q_bLhk.reshape(b * L, g, h // g, k)
    keys, values = (x[..., :last, :].flatten(0, 1) for x in (k_bLgwk, v_bLgwk))
    if mask is not None:
        mask = mask.repeat_interleave(L, 0)
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask).view(b, L, h, k)
