"""Transformer Engine on the virtual GPU: its own Python, PyTorch in place of its CUDA.

    TRITON_INTERPRET=1 python -m pytest -p tests.virtual_te tests/gpu/test_fp8.py
    TRITON_INTERPRET=1 python -m tests.virtual_te tools/pretrain.py --config ...

Transformer Engine 2.20.2 must be installed, a GPU need not be there. Everything that it writes in
Python runs as it is: modules, autograd functions, FP8 recipes and their state, quantised tensors,
copies of weights, fused weight gradients, the choice of attention. What it writes in CUDA is
replaced by tests/te_in_torch.py, and so are its Triton kernels but for float32 (Triton's
interpreter computes bf16 wrongly). So numbers are those of FP8 and of bf16, to the order of sums.
Nothing is said about time and memory.
"""

import inspect
import runpy
import sys
from functools import partial
from typing import Any

from tests import virtual_gpu

virtual_gpu.install()

import torch  # noqa: E402
import transformer_engine.pytorch  # noqa: E402, F401  loads the next
import transformer_engine_torch as tex  # noqa: E402
from transformer_engine.pytorch import permutation  # noqa: E402
from transformer_engine.pytorch.triton import permutation as kernels  # noqa: E402
from triton.runtime.autotuner import Autotuner  # noqa: E402

from tests import te_in_torch, te_routing_in_torch  # noqa: E402

OTHER_NAMES = {
    "fused_topk_with_score_function_fwd": "topk_fwd",
    "fused_topk_with_score_function_bwd": "topk_bwd",
    "fused_score_for_moe_aux_loss_fwd": "score_fwd",
    "fused_score_for_moe_aux_loss_bwd": "score_bwd",
    "fused_amax_and_scale_update_after_reduction": "update_scales",
}
ITS_OWN = {"get_cublasLt_version", "get_num_cublas_streams", "get_cudnn_version"}
"""What needs no GPU."""

pytest_runtest_protocol = virtual_gpu.pytest_runtest_protocol


def _ours(name: str) -> Any:
    def missing(*_: Any, **__: Any) -> Any:
        raise NotImplementedError(f"tests/te_in_torch.py has no {name}")

    name = OTHER_NAMES.get(name, name)
    return getattr(te_in_torch, name, getattr(te_routing_in_torch, name, missing))


class _OnHost:
    """PyTorch for what makes tensors inside a custom operation, where no dispatch mode sees it."""

    def __getattr__(self, name: str) -> Any:
        found = getattr(torch, name)
        if name not in ("empty", "zeros", "ones", "full"):
            return found
        return lambda *args, **kwargs: found(*args, **{**kwargs, "device": "cpu"})


def _put_into_modules() -> None:
    """Replace the extension's functions wherever a module holds them."""
    replaced = {
        function: _ours(name)
        for name, function in vars(tex).items()
        if inspect.isbuiltin(function) and name not in ITS_OWN
    }
    for name, module in list(sys.modules.items()):
        if name.startswith(("transformer_engine", "megatron")):
            for what, found in list(vars(module).items()):
                if inspect.isbuiltin(found) and found in replaced:
                    setattr(module, what, replaced[found])


def _by_type(theirs: Any, ours: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    return (theirs if x.dtype == torch.float32 else ours)(x, *args, **kwargs)


def _put_into_kernels() -> None:
    """Triton's for float32, which its interpreter runs slowly; of other types PyTorch."""
    kernels.make_row_id_map = te_routing_in_torch.make_row_id_map
    kernels.make_chunk_sort_map = te_routing_in_torch.make_chunk_sort_map
    for name in (
        "sort_chunks_by_map",
        "permute_with_mask_map",
        "unpermute_with_mask_map",
        "unpermute_with_mask_map_bwd_with_merging_probs",
    ):
        pair = getattr(kernels, name), getattr(te_routing_in_torch, name)
        setattr(kernels, name, partial(_by_type, *pair))
    permutation.torch = kernels.torch = _OnHost()
    Autotuner.run = lambda self, *args, **kwargs: self.fn.run(
        *args, **kwargs, **self.configs[0].kwargs
    )


def install() -> None:
    """Do it, once in a process; then enter ``virtual_gpu.VirtualGPU``."""
    _put_into_modules()
    _put_into_kernels()


def pytest_configure() -> None:
    """Serve as a plugin of pytest."""
    install()


if __name__ == "__main__":
    install()
    sys.argv = sys.argv[1:]
    with virtual_gpu.VirtualGPU():
        runpy.run_path(sys.argv[0], run_name="__main__")
