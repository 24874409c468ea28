"""A GPU for tests that is not there: tensors on the CPU, some of which count as lying on a GPU.

    python -m pytest -p tests.virtual_gpu tests/gpu/test_model.py

Code then takes its way for GPUs (``torch.cuda.is_available()`` is true), and what only a GPU would
find is found: an operation on tensors of both sides raises, as CUDA does, and ``HOST_WAITS`` counts
where the host would wait for the GPU, which a CUDA graph forbids and which keeps the host from
running ahead.

A storage carries the mark; results of an operation on marked tensors are marked. Nothing is
measured here, Transformer Engine has no place (its kernels are no operations of PyTorch), nothing
is compiled, and Triton kernels run where TRITON_INTERPRET=1 lets them (in float32: Triton 3.6's
interpreter computes bf16 wrongly).
"""

import contextlib
import os
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from functools import cache
from types import SimpleNamespace
from typing import Any

os.environ["TORCHDYNAMO_DISABLE"] = "1"

import pytest
import torch
import torch.distributed as dist
import torch.nn.attention.bias
from torch.distributed._shard.sharded_tensor.api import _SHARDED_OPS
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
HOST_WAITS: Counter[str] = Counter()
"""Where the host would have waited: ``operation: file:line``."""
_TAKE_BOTH = {"copy_", "index", "index_put_", "_index_put_impl_"}
"""Operations on a tensor of one side that take others of the other side, and wait."""
_OF_CUBLAS = {"mm", "addmm", "bmm", "baddbmm", "addmv", "dot"}
_REPEATS = "CUBLAS_WORKSPACE_CONFIG"
_READ_BACK = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "bincount", "equal"}
_GIB = 2**30


def lies_on_gpu(x: torch.Tensor) -> bool:
    """Whether ``x`` counts as lying on the GPU."""
    return type(x) in (torch.Tensor, torch.nn.Parameter) and hasattr(x.untyped_storage(), "gpu")


class VirtualGPU(TorchDispatchMode):
    """Marks what is made on the GPU, or of what lies there.

    Raises:
        RuntimeError: an operation on tensors of both sides.
    """

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation."""
        kwargs = dict(kwargs or {})
        namespace, name = op._schema.name.split("::")
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        marked = [x for x in tensors if lies_on_gpu(x)]
        if marked and namespace == "aten":
            # Zeros are let through: autograd makes those of an output that nobody used, here on
            # the CPU.
            others = [x for x in tensors if x.dim() and not lies_on_gpu(x)]
            takes_both = name == "copy_" or (name in _TAKE_BOTH and lies_on_gpu(args[0]))
            if not takes_both and any(x.any() for x in others):
                raise RuntimeError(f"{name}: tensors on {GPU} and on {CPU}")
            if name in _OF_CUBLAS and not _cublas_repeats():
                raise RuntimeError(f"{name}: deterministic, but {_REPEATS} was not set in time")
            if _waits(name, args, kwargs):
                _note(name)
        elif name == "copy_" and _waits(name, args, kwargs):
            _note(name)
        makes = _is_gpu(kwargs.get("device"))
        if makes:
            kwargs["device"] = CPU
            kwargs.pop("pin_memory", None)
        whole = name == "histc" and bool(marked) and not args[0].is_floating_point()
        if whole:  # a GPU counts whole numbers, too
            args = (args[0].double(), *args[1:])
        out = op(*args, **kwargs)
        out = out.to(marked[0].dtype) if whole else out
        if makes or (marked and name != "copy_"):
            for x in tree_leaves(out):
                _mark(x)
        return out


@cache
def _was_set_in_time() -> bool:
    """Whether cuBLAS was told to repeat; PyTorch looks once, at a process's first product."""
    return os.environ.get(_REPEATS) in (":4096:8", ":16:8")


def _cublas_repeats() -> bool:
    return _was_set_in_time() or not torch.are_deterministic_algorithms_enabled()


def _waits(name: str, args: Any, kwargs: Any) -> bool:
    if name == "copy_":
        non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
        return lies_on_gpu(args[0]) != lies_on_gpu(args[1]) and not non_blocking
    if name in ("index", "index_put_", "_index_put_impl_"):
        indices = [x for x in args[1] if x is not None]
        if any(not lies_on_gpu(x) for x in indices):
            return True
        fills = name != "index" and args[2].numel() == 1 and len(args[1]) == 1  # masked_fill
        return any(x.dtype == torch.bool for x in indices) and not fills
    return name in _READ_BACK


def _note(name: str) -> None:
    """Count the innermost line outside of PyTorch and of this file."""
    for frame in reversed(traceback.extract_stack()):
        if frame.filename.endswith("distributed_c10d.py"):
            return  # gloo's copies; NCCL has none
        if "/torch/" not in frame.filename and frame.filename != __file__:
            place = frame.filename.rpartition("site-packages/")[2].rpartition("/pltmoe/")[2]
            HOST_WAITS[f"{name}: {place}:{frame.lineno}"] += 1
            return


def _mark(x: Any) -> Any:
    if isinstance(x, torch.Tensor):
        x.untyped_storage().gpu = True
    return x


def _is_gpu(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, int) and not isinstance(device, bool)


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, to_gpu: bool) -> torch.Tensor:
        ctx.to_gpu = to_gpu
        return _moved(x, to_gpu)

    @staticmethod
    def backward(ctx: Any, dx: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _moved(dx, not ctx.to_gpu), None


def _moved(x: torch.Tensor, to_gpu: bool) -> torch.Tensor:
    with _disable_current_modes():
        copy = torch.empty_strided(x.size(), x.stride(), dtype=x.dtype).copy_(x.detach())
    return _mark(copy) if to_gpu else copy


def _move(x: torch.Tensor, to_gpu: bool, non_blocking: bool) -> torch.Tensor:
    if to_gpu == lies_on_gpu(x):
        return x
    if not non_blocking:
        _note("to")
    return _Move.apply(x, to_gpu) if x.requires_grad else _moved(x, to_gpu)


def _on_host(x: torch.Tensor) -> torch.Tensor:
    if lies_on_gpu(x):
        raise TypeError("a tensor on the GPU cannot become an array of NumPy: use .cpu() first")
    return x


def _redirect_tensors() -> None:
    """Where tensors lie is asked for and changed by methods, not by operations."""
    _device_constructors()  # ``with torch.device(...)`` knows them by identity, from its first use
    Tensor, to, type_ = torch.Tensor, torch.Tensor.to, torch.Tensor.type
    tolist, numpy, device = Tensor.tolist, Tensor.numpy, Tensor.device.__get__

    def to_(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        wanted, kept = kwargs.pop("device", None), []
        for argument in args:
            if isinstance(argument, torch.Tensor):
                wanted, argument = argument.device, argument.dtype
            if isinstance(argument, str | torch.device) or type(argument) is int:
                wanted = argument
            elif argument is not None:
                kept.append(argument)
        non_blocking = kwargs.pop("non_blocking", False) or True in kept
        if _is_gpu(wanted) or torch.device(wanted or GPU) == CPU:
            self = _move(self, _is_gpu(wanted), non_blocking)
        elif wanted is not None:  # "meta"
            kwargs["device"] = wanted
        kept = [x for x in kept if isinstance(x, torch.dtype)]
        return to(self, *kept, **kwargs) if kept or kwargs else self

    def typed(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        found = type_(self, *args, **kwargs)
        named = isinstance(found, str) and lies_on_gpu(self)
        return found.replace("torch.", "torch.cuda.", 1) if named else found

    Tensor.device = property(lambda self: GPU if lies_on_gpu(self) else device(self))
    _SHARDED_OPS[Tensor.device.__get__] = _SHARDED_OPS[device]
    Tensor.is_cuda = property(lies_on_gpu)
    Tensor.to, Tensor.type = to_, typed
    Tensor.cuda = lambda self, device=None, non_blocking=False: _move(self, True, non_blocking)
    Tensor.cpu = lambda self: _move(self, False, False)
    Tensor.tolist = lambda self: tolist(self.cpu())
    Tensor.numpy = lambda self, **kwargs: numpy(_on_host(self), **kwargs)
    Tensor.pin_memory = lambda self: self
    Tensor.record_stream = lambda self, stream: None
    tensor, as_tensor = torch.tensor, torch.as_tensor

    def make(*args: Any, device: Any = None, pin_memory: bool = False, **kwargs: Any) -> Any:
        made = tensor(*args, **kwargs)
        return _mark(made) if _is_gpu(device) else made

    torch.tensor, torch.Generator = make, _Generator
    torch.as_tensor = lambda data, dtype=None, device=None: (
        as_tensor(data, dtype=dtype) if device is None else as_tensor(data, dtype=dtype).to(device)
    )
    # A tensor that is a subclass, which a dispatch mode cannot hold.
    torch.nn.attention.bias.causal_lower_right = lambda rows, slots: torch.ones(
        rows, slots, dtype=torch.bool, device=GPU
    ).tril(slots - rows)


class _Generator(torch.Generator):
    """Draws on the CPU, whatever the device."""

    def __new__(cls, device: Any = None) -> "_Generator":
        return super().__new__(cls)


class _Done:
    """A stream, an event: all that was asked of it has happened."""

    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def synchronize(self) -> None:
        _note("synchronize")

    def __getattr__(self, name: str) -> Callable[..., "_Done"]:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args: self


class _Message:
    """A message under way; NCCL's may be waited for twice, gloo's would wait for the next one."""

    def __init__(self, work: Any):
        self._work = work

    def wait(self) -> None:
        if self._work is not None:
            self._work.wait()
        self._work = None


def _redirect_cuda() -> None:
    cuda: Any = torch.cuda
    properties = SimpleNamespace(
        name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, total_memory=139 * _GIB
    )
    answers = {
        "is_available": True, "current_device": 0,
        "device_count": int(os.environ.get("LOCAL_WORLD_SIZE", 1)), "_lazy_init": None,
        "get_device_name": "NVIDIA H200", "get_device_capability": (9, 0),
        "get_device_properties": properties, "is_bf16_supported": True,
        "set_device": None, "set_stream": None, "empty_cache": None,
        "manual_seed": None, "manual_seed_all": None, "ipc_collect": None,
        "memory_allocated": _GIB, "max_memory_allocated": _GIB, "memory_reserved": _GIB,
        "max_memory_reserved": _GIB, "reset_peak_memory_stats": None,
        "mem_get_info": (139 * _GIB, 139 * _GIB), "memory_stats": defaultdict(int),
        "is_current_stream_capturing": False, "set_rng_state": None,
    }  # fmt: skip
    for name, answer in answers.items():
        setattr(cuda, name, lambda *args, answer=answer, **kwargs: answer)
    cuda.get_rng_state = lambda *args, **kwargs: torch.random.get_rng_state()
    cuda.Stream = cuda.Event = _Done
    cuda.synchronize = lambda *args: _note("synchronize")
    cuda.current_stream = cuda.default_stream = lambda *args: _Done()
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.nvtx.range_push = cuda.nvtx.range_pop = lambda *args, **kwargs: None
    torch.compile = lambda function=None, **kwargs: function or (lambda f: f)
    batch = dist.batch_isend_irecv
    dist.batch_isend_irecv = lambda messages: [_Message(work) for work in batch(messages)]
    start = dist.init_process_group
    dist.init_process_group = lambda backend=None, **kwargs: start("gloo", **kwargs)


def _let_kernels_run() -> None:
    """Triton's interpreter takes the numbers of marked tensors as they are."""
    from triton.runtime.interpreter import GridExecutor

    launch = GridExecutor.__call__

    def launch_outside(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return launch(self, *args, **kwargs)

    GridExecutor.__call__ = launch_outside
    from tests.unit.inference.kernel_cases import let_the_interpreter_count

    let_the_interpreter_count()


def install() -> None:
    """Do it, once in a process and before Megatron is imported; then enter ``VirtualGPU``."""
    _redirect_cuda()
    _redirect_tensors()
    _let_kernels_run()
    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = lambda *args, **kwargs: torch.random.get_rng_state()
    random._set_cuda_rng_state = lambda *args, **kwargs: None


def pytest_configure() -> None:
    """Serve as a plugin of pytest."""
    install()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol() -> Iterator[None]:
    """Run every test, and its fixtures, on the virtual GPU."""
    with VirtualGPU():
        yield
