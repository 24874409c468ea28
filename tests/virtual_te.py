"""Transformer Engine on the virtual GPU: models built of its modules, compared with the reference.

    TRITON_INTERPRET=1 python -m tests.virtual_te row5_plt2 shared_routing_plt3

Its library must be installed, a GPU need not be there. What its modules compute is written here in
PyTorch (after the documentation of Transformer Engine 2.20.2), float32; its Triton kernels, which
permute tokens, run as they are. So this checks what is around the modules: which are built, what
each is given (windows, order of dimensions, rows of every expert), and Megatron-core's wrappers.
"""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests import virtual_gpu

virtual_gpu.install()

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import transformer_engine.pytorch as te  # noqa: E402
from megatron.core.models.common.embeddings import rope_utils  # noqa: E402
from megatron.core.transformer.moe import moe_utils  # noqa: E402
from torch import Tensor  # noqa: E402
from transformer_engine.pytorch import permutation  # noqa: E402
from transformer_engine.pytorch.triton import permutation as permutation_kernels  # noqa: E402
from triton.runtime.autotuner import Autotuner  # noqa: E402

from pltmoe.model.cross_loop import window_mask  # noqa: E402
from pltmoe.model.reference import attend  # noqa: E402
from tests.single_process import build_model, create_single_process_groups  # noqa: E402
from tests.unit.model.cases import ALL, small_model  # noqa: E402
from tests.unit.model.parity import ROUNDED, assert_equals_reference  # noqa: E402


def linear(self: Any, x: Tensor, is_first_microbatch: bool | None = None, **_: Any) -> Any:
    """``te.Linear`` without bias."""
    y = F.linear(x, self.weight)
    return (y, None) if self.return_bias else y


def grouped_linear(
    self: Any, x_ri: Tensor, m_splits: Any, is_first_microbatch: bool | None = None, **_: Any
) -> Any:
    """``te.GroupedLinear``: it takes the rows of each expert as a list of numbers."""
    assert isinstance(m_splits, list) and sum(m_splits) == x_ri.size(0)
    parts = enumerate(x_ri.split(m_splits))
    y = torch.cat([F.linear(x, getattr(self, f"weight{number}")) for number, x in parts])
    return (y, None) if self.return_bias else y


def rms_norm(self: Any, x: Tensor, *_: Any, **__: Any) -> Tensor:
    """``te.RMSNorm`` whose weight is not stored less one."""
    assert not self.zero_centered_gamma
    return F.rms_norm(x, (x.size(-1),), self.weight, self.eps)


def attention(
    self: Any,
    q_sbhk: Tensor,
    k_sbgk: Tensor,
    v_sbgk: Tensor,
    attention_mask: Tensor | None = None,
    qkv_format: str | None = None,
    attn_mask_type: str | None = None,
    window_size: tuple[int, int] | None = None,
    **_: Any,
) -> Tensor:
    """``te.DotProductAttention``: a window of (w - 1, 0) is the slot itself and w - 1 before it."""
    assert attention_mask is None and (attn_mask_type or self.attn_mask_type) == "causal"
    assert (qkv_format or self.qkv_format) == "sbhd"
    left, right = window_size or self.window_size
    assert right == 0
    slots = q_sbhk.size(0)
    visible = window_mask(slots, slots if left < 0 else left + 1, q_sbhk.device)
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q_sbhk, k_sbgk, v_sbgk))
    return attend(q, k, v, visible).permute(2, 0, 1, 3).flatten(2)


def choose(
    logits: Tensor,
    topk: int,
    use_pre_softmax: bool,
    num_groups: int | None = None,
    group_topk: int | None = None,
    scaling_factor: float | None = None,
    score_function: str = "softmax",
    expert_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``fused_topk_with_score_function`` with a softmax over the chosen."""
    assert not (use_pre_softmax or num_groups or group_topk or scaling_factor)
    assert score_function == "softmax" and expert_bias is None
    best, experts = logits.topk(topk, -1)
    probs = torch.zeros_like(logits).scatter(1, experts, best.softmax(-1))
    return probs, torch.zeros_like(logits, dtype=torch.bool).scatter(1, experts, True)


def rotate(x_sbhk: Tensor, freqs: Tensor, interleaved: bool = False, **_: Any) -> Tensor:
    """``fused_apply_rotary_pos_emb``: Megatron's unfused one."""
    return rope_utils._apply_rotary_pos_emb_bshd(x_sbhk, freqs, rotary_interleaved=interleaved)


class _OnHost:
    """PyTorch for what makes tensors inside a custom operation, where no dispatch mode sees it."""

    def __getattr__(self, name: str) -> Any:
        found = getattr(torch, name)
        if name not in ("empty", "zeros", "ones", "full"):
            return found
        return lambda *args, **kwargs: found(*args, **{**kwargs, "device": "cpu"})


def install() -> None:
    """Put PyTorch into Transformer Engine's modules."""
    te.Linear.forward, te.GroupedLinear.forward = linear, grouped_linear
    te.RMSNorm.forward, te.DotProductAttention.forward = rms_norm, attention
    rope_utils.fused_apply_rotary_pos_emb = rotate
    moe_utils.fused_topk_with_score_function = choose
    moe_utils.te_general_gemm = None  # the router's product
    for module in (permutation, permutation_kernels):
        module.torch = _OnHost()
    untuned: Callable[..., Any] = lambda self, *args, **kwargs: self.fn.run(  # noqa: E731
        *args, **kwargs, **self.configs[0].kwargs
    )
    Autotuner.run = untuned


def main() -> None:
    """Compare the models that the command line names with the float64 reference."""
    install()
    with virtual_gpu.VirtualGPU(), tempfile.TemporaryDirectory() as folder:
        groups = create_single_process_groups(Path(folder))
        for name in sys.argv[1:]:
            model = small_model(**{**ALL[name], **ROUNDED})
            plt = build_model(model, groups, torch.float32, "transformer_engine")
            assert_equals_reference(plt, model, tolerance=2e-4, loss_tolerance=1e-4)
            print(name, "equals the reference", flush=True)


if __name__ == "__main__":
    main()
