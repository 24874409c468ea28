"""Attention without Transformer Engine: PyTorch's fused kernels, causal and sliding-window.

No s x s matrix is built: causal attention uses SDPA's own causal mode, and the window is cut into
bands, so its memory grows with s * window. Letters: s slots, b sequences, h query heads, g KV
heads, k head size, n blocks.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right

from pltmoe.model.slots import AllSlots, Slots


def causal_attention(q_bhsk: Tensor, k_bgsk: Tensor, v_bgsk: Tensor) -> Tensor:
    """Attend to all slots up to the query's own; returns [b, h, s, k].

    There may be more keys than queries: the last key belongs to the last query.
    """
    queries, keys = q_bhsk.size(2), k_bgsk.size(2)
    if queries == keys:
        return attend_fused(q_bhsk, k_bgsk, v_bgsk, is_causal=True)
    return attend_fused(q_bhsk, k_bgsk, v_bgsk, attn_mask=causal_lower_right(queries, keys))


def window_attention(q_bhsk: Tensor, k_bgsk: Tensor, v_bgsk: Tensor, window_keys: int) -> Tensor:
    """Attend to the ``window_keys`` last slots, the query's own included; returns [b, h, s, k].

    Slots are cut into blocks at least as long as the window, so a query needs only its own and the
    previous block:

        keys    [ block i-1 | block i ]      a band of width window_keys ends at the query
        queries             [ block i ]
    """
    if past := k_bgsk.size(2) - q_bhsk.size(2):  # keys before the first query
        padded = F.pad(q_bhsk, (0, 0, past, 0))
        return window_attention(padded, k_bgsk, v_bgsk, window_keys)[:, :, past:]
    b, h, s, k = q_bhsk.shape
    if window_keys >= s:
        return causal_attention(q_bhsk, k_bgsk, v_bgsk)
    size = max(window_keys, 64)
    blocks = -(-s // size)
    pad = (0, 0, 0, blocks * size - s)

    def cut(x: Tensor) -> Tensor:  # [b, heads, s, k] -> [b, n, heads, size, k]
        return F.pad(x, pad).view(b, x.size(1), blocks, size, k).transpose(1, 2)

    def with_previous(x: Tensor) -> Tensor:  # [b, n, g, size, k] -> [b * n, g, 2 * size, k]
        before = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)
        return torch.cat([before, x], dim=3).flatten(0, 1)

    out = attend_fused(
        cut(q_bhsk).flatten(0, 1),
        with_previous(cut(k_bgsk)),
        with_previous(cut(v_bgsk)),
        attn_mask=_band(blocks, size, window_keys, q_bhsk.device).repeat(b, 1, 1, 1),
    )
    return out.view(b, blocks, h, size, k).transpose(1, 2).reshape(b, h, blocks * size, k)[:, :, :s]


def attend_fused(q_bhsk: Tensor, k_bgtk: Tensor, v_bgtk: Tensor, **how: Any) -> Tensor:
    """Call SDPA so that a fused kernel takes it.

    On a GPU only the flash kernel knows grouped heads, and it takes neither a mask nor float32;
    PyTorch would then build s x s scores without a word. There KV heads are repeated.
    """
    groups = q_bhsk.size(1) // k_bgtk.size(1)
    flash = q_bhsk.dtype in (torch.bfloat16, torch.float16) and "attn_mask" not in how
    if groups > 1 and q_bhsk.is_cuda and not flash:
        k_bgtk, v_bgtk = (x.repeat_interleave(groups, 1) for x in (k_bgtk, v_bgtk))
        groups = 1
    with without_cudnn() if "attn_mask" in how else nullcontext():
        return F.scaled_dot_product_attention(q_bhsk, k_bgtk, v_bgtk, enable_gqa=groups > 1, **how)


@contextmanager
def without_cudnn() -> Iterator[None]:
    """Keep SDPA from cuDNN's kernels, which PyTorch 2.11 takes before all others on Hopper.

    They are fast, but a plan is made for every new length (0.1 s and more), and with a mask
    gradients of queries may be NaN (pytorch/pytorch issue 196678).
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def _band(blocks: int, size: int, window_keys: int, device: torch.device) -> Tensor:
    """Mask [n, 1, size, 2 * size]: who sees whom within a block and the one before it."""
    query = torch.arange(size, device=device)[:, None] + size
    key = torch.arange(2 * size, device=device)[None, :]
    band = (query >= key) & (query - key < window_keys)
    block = torch.arange(blocks, device=device)[:, None, None]
    return (band & ((block > 0) | (key >= size))).unsqueeze(1)


class SDPACoreAttention(nn.Module):
    """Megatron's core-attention slot filled with SDPA: the whole past, or a sliding window."""

    def __init__(
        self, *, window_keys: int | None = None, slots: Slots | None = None, **megatron: Any
    ):
        """``window_keys`` counts the current token; None attends to the whole past."""
        super().__init__()
        self.window_keys, self._slots = window_keys, slots or AllSlots()

    def forward(
        self, query_sbhk: Tensor, key_sbgk: Tensor, value_sbgk: Tensor, *_: Any, **__: Any
    ) -> Tensor:
        """Return [s, b, h * k].

        Where the sequence is cut, each segment attends to its own keys and those before it.
        """
        if self._slots.segments is None:
            return self._attend(query_sbhk, key_sbgk, value_sbgk)
        reach = None if self.window_keys is None else self.window_keys - 1
        # They travel together. Not stacked along the last axis: kernels want it whole, and PyTorch
        # would fall back to s x s scores without a word.
        kv_s = torch.stack([key_sbgk, value_sbgk], 2)
        pasts = self._slots.with_past(kv_s, reach)
        queries = query_sbhk.split([stop - start for start, stop in self._slots.segments])
        return torch.cat(
            [self._attend(q, *kv.unbind(2)) for q, kv in zip(queries, pasts, strict=True)]
        )

    def _attend(self, query_sbhk: Tensor, key_sbgk: Tensor, value_sbgk: Tensor) -> Tensor:
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query_sbhk, key_sbgk, value_sbgk))
        if self.window_keys is None:
            out = causal_attention(q, k, v)
        else:
            out = window_attention(q, k, v, self.window_keys)
        return out.permute(2, 0, 1, 3).flatten(2)
