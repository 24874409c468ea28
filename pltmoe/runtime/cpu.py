"""What stands in for CUDA on a machine without a GPU, so that Megatron-core runs there unchanged.

Megatron-core names CUDA in many places where it only means "the device". On a machine without a
GPU this file, and no other, redirects those names to the CPU; with a GPU it does nothing. Tests and
the quickstart thus run the very code that a cluster runs, over gloo instead of NCCL.

Redirected: streams and events (no-ops, a CPU is synchronous), ``device="cuda"`` in tensor factories
and ``.to``, ``.cuda()``, ``Tensor.type()`` (Megatron compares it with ``torch.cuda.FloatTensor``),
the CUDA random state, and what gloo lacks: tensor-valued split sizes of ``all_to_all_single``, and
``all_gather`` and ``reduce_scatter`` of uneven pieces (experts under expert tensor parallelism).
Put back: PyTorch's arithmetic, where Megatron takes kernels of Transformer Engine or Apex as soon
as one of them is installed (on a login node, in a container without a GPU).
"""

import contextlib
import functools
import os
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._device import _device_constructors

_FACTORIES = ("empty", "zeros", "ones", "full", "tensor", "arange", "rand", "randn", "randint")
_LIKE = ("empty_like", "zeros_like", "ones_like", "full_like")
_TENSOR_TYPES = ("Float", "Int", "Long", "Double", "Byte", "BFloat16", "Half")

_standing_in = False


def stand_in_for_cuda() -> bool:
    """Redirect CUDA to the CPU if there is no CUDA device; return whether the CPU stands in.

    Call it once per process, before ``megatron.core`` is imported. Calling again is harmless.
    """
    global _standing_in
    if torch.cuda.is_available() or _standing_in:
        return _standing_in
    _standing_in = True
    _redirect_devices()
    _redirect_streams()
    _redirect_collectives()
    _import_megatron_uncompiled()
    _redirect_random_state()
    _put_torch_arithmetic_back()
    return True


def is_standing_in() -> bool:
    """Whether the CPU stands in for CUDA in this process."""
    return _standing_in


class _NoStream:
    """A stream or event of a synchronous device: everything asked of it has already happened."""

    def __init__(self, *args: Any, **kwargs: Any):
        self.cuda_stream = 0

    def _done(self, *args: Any, **kwargs: Any) -> None:
        return None

    wait_stream = wait_event = synchronize = record = wait = _done

    def record_event(self, *args: Any) -> "_NoStream":
        return _NoStream()

    def query(self) -> bool:
        return True


def _to_cpu(device: Any) -> Any:
    if isinstance(device, torch.device):
        return torch.device("cpu") if device.type == "cuda" else device
    return "cpu" if isinstance(device, str) and device.startswith("cuda") else device


def _redirect_device_argument(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs:
            kwargs["device"] = _to_cpu(kwargs["device"])
        return function(*args, **kwargs)

    return wrapper


def _redirect_devices() -> None:
    # ``with torch.device(...)`` knows factories by identity and collects them on first use: let it
    # collect the real ones, or it does nothing and modules built on "meta" hold garbage.
    _device_constructors()
    torch.cuda.current_device = lambda: torch.device("cpu")
    for name in _FACTORIES + _LIKE:
        setattr(torch, name, _redirect_device_argument(getattr(torch, name)))
    tensor_to, tensor_type = torch.Tensor.to, torch.Tensor.type

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if "device" in kwargs:
            kwargs["device"] = _to_cpu(kwargs["device"])
        return tensor_to(self, *(_to_cpu(arg) for arg in args), **kwargs)

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return tensor_type(self, *args, **kwargs)
        return tensor_type(self).replace("torch.", "torch.cuda.", 1)

    torch.Tensor.to, torch.Tensor.type = to, type_
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self
    for name in _TENSOR_TYPES:
        setattr(torch.cuda, f"{name}Tensor", getattr(torch, f"{name}Tensor"))


def _redirect_streams() -> None:
    torch.cuda.Stream = torch.cuda.Event = _NoStream
    torch.cuda.current_stream = lambda *args: _NoStream()
    torch.cuda.stream = lambda stream: contextlib.nullcontext()
    torch.cuda.synchronize = lambda *args: None


def _redirect_collectives() -> None:
    import torch.distributed as dist

    all_to_all_single = dist.all_to_all_single

    def as_list(sizes: Any) -> Any:
        return sizes.tolist() if isinstance(sizes, torch.Tensor) else sizes

    @functools.wraps(all_to_all_single)
    def with_list_sizes(
        output: Any,
        input: Any,
        output_split_sizes: Any = None,
        input_split_sizes: Any = None,
        **kw: Any,
    ) -> Any:
        return all_to_all_single(
            output, input, as_list(output_split_sizes), as_list(input_split_sizes), **kw
        )

    dist.all_to_all_single = with_list_sizes
    all_gather, reduce_scatter = dist.all_gather, dist.reduce_scatter

    @functools.wraps(all_gather)
    def uneven_all_gather(pieces: Any, mine: Any, group: Any = None, async_op: bool = False) -> Any:
        if async_op or len({piece.shape for piece in pieces}) == 1:
            return all_gather(pieces, mine, group=group, async_op=async_op)
        pieces[dist.get_rank(group)].copy_(mine)
        for source, piece in enumerate(pieces):
            whole = piece.contiguous()
            dist.broadcast(whole, group=group, group_src=source)
            piece.copy_(whole)
        return None

    @functools.wraps(reduce_scatter)
    def uneven_reduce_scatter(mine: Any, pieces: Any, *args: Any, group: Any = None) -> Any:
        if len({piece.shape for piece in pieces}) == 1:
            return reduce_scatter(mine, pieces, *args, group=group)
        for target, piece in enumerate(pieces):
            whole = piece.clone()
            dist.all_reduce(whole, *args, group=group)
            if target == dist.get_rank(group):
                mine.copy_(whole)
        return None

    dist.all_gather, dist.reduce_scatter = uneven_all_gather, uneven_reduce_scatter


def _import_megatron_uncompiled() -> None:
    """Megatron decorates small functions with torch.compile.

    Compiling those for a CPU costs more than it gains and needs a C++ compiler at run time; the
    decorator alone loads PyTorch's compiler, a fifth of what starting a process takes.
    """
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # whoever else asks for it
    compile_, torch.compile = torch.compile, lambda function: function
    try:
        from megatron.core.jit import disable_jit_fuser
    finally:
        torch.compile = compile_
    disable_jit_fuser()  # of what is imported later


def _redirect_random_state() -> None:
    torch.cuda.manual_seed = torch.manual_seed
    torch.cuda.get_rng_state = lambda *args, **kwargs: torch.random.get_rng_state()
    torch.cuda.set_rng_state = lambda state, *args, **kwargs: torch.random.set_rng_state(state)
    from megatron.core.tensor_parallel import random as megatron_random

    megatron_random._get_cuda_rng_state = lambda *args, **kwargs: torch.random.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.random.set_rng_state(
        state
    )


def _put_torch_arithmetic_back() -> None:
    """Undo the choices that Megatron makes by what can be imported, not by what can run.

    Everything else of Transformer Engine or Apex is asked for in the configuration, and
    ``runtime/devices.py`` does not ask for it without a GPU. Source: megatron-core 0.19.2, the
    ``except ImportError`` branches of the modules named here.
    """
    import megatron.core.optimizer as optimizers
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads, distrib_optimizer, optimizer
    from megatron.core.transformer.moe import moe_utils

    moe_utils.te_general_gemm = None  # the router's product
    optimizers.USING_PYTORCH_OPTIMIZER = True
    optimizers.Adam, optimizers.SGD = torch.optim.AdamW, torch.optim.SGD
    distrib_optimizer.HAVE_APEX_OR_TE = False  # where Adam's step count is stored
    distrib_optimizer.USING_TE_OPTIMIZER = distrib_optimizer.USING_APEX_OPTIMIZER = False
    distrib_optimizer.Adam = torch.optim.Adam
    for module in (optimizer, clip_grads):
        module.multi_tensor_applier = utils.local_multi_tensor_applier
        module.multi_tensor_scale_impl = utils.local_multi_tensor_scale
    clip_grads.multi_tensor_scale_tensor_impl = None
    clip_grads.l2_norm_impl = utils.local_multi_tensor_l2_norm
