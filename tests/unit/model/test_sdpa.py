"""Fused attention against explicit masks, and no s x s matrix on the way."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from pltmoe.model.cross_loop import window_mask
from pltmoe.model.reference import attend
from pltmoe.model.sdpa import causal_attention, window_attention


def heads(s: int, kv_heads: int) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(s)
    shapes = ((2, 4, s, 8), (2, kv_heads, s, 8), (2, kv_heads, s, 8))
    return tuple(torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(
    ("s", "window"),
    [(5, 64), (64, 64), (65, 64), (128, 64), (200, 64), (130, 1), (97, 80), (300, 130)],
)
def test_window_attention_equals_full_mask(s: int, window: int, kv_heads: int) -> None:
    q, k, v = heads(s, kv_heads)
    expected = attend(q, k, v, window_mask(s, window))
    got = window_attention(q, k, v, window)
    assert (got - expected).abs().max() < 1e-12
    for a, b in zip(
        torch.autograd.grad(got.square().sum(), (q, k, v)),
        torch.autograd.grad(expected.square().sum(), (q, k, v)),
        strict=True,
    ):
        assert (a - b).abs().max() < 1e-11


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_causal_attention_equals_full_mask(kv_heads: int) -> None:
    q, k, v = heads(70, kv_heads)
    expected = attend(q, k, v, window_mask(70, 70))
    assert (causal_attention(q, k, v) - expected).abs().max() < 1e-12


def test_only_attention_without_a_mask_may_be_cudnns(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, seen = F.scaled_dot_product_attention, []

    def watched(*tensors: torch.Tensor, **how: Any) -> torch.Tensor:
        seen.append(("attn_mask" in how, torch.backends.cuda.cudnn_sdp_enabled()))
        return plain(*tensors, **how)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    window_attention(*heads(130, 1), 3)
    causal_attention(*heads(130, 1))
    assert seen == [(True, False), (False, True)]


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation made."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


@pytest.mark.parametrize("window", [None, 64])
def test_no_s_by_s_matrix_is_built(window: int | None) -> None:
    s = 4096
    q, k, v = (torch.randn(1, heads, s, 8, requires_grad=True) for heads in (2, 1, 1))
    with LargestTensor() as seen:
        out = causal_attention(q, k, v) if window is None else window_attention(q, k, v, window)
        out.sum().backward()
    assert 0 < seen.largest < s * s // 8
