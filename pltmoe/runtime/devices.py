"""What the machine is: device, precision, peak FLOP/s for MFU, and which fused libraries exist."""

import importlib
import importlib.util
import os
import resource
from dataclasses import dataclass
from typing import Literal

import torch

from pltmoe.config.run import Precision
from pltmoe.errors import ConfigError

_PEAK_BF16_FLOPS: tuple[tuple[str, float], ...] = (
    # Dense bf16 from NVIDIA's data sheets, FLOP/s. First match wins: special names come first.
    ("GB200", 2.5e15),
    ("B200", 2.25e15),
    ("H200 NVL", 8.355e14),
    ("H200", 9.895e14),
    ("H100 PCIe", 7.56e14),
    ("H100 NVL", 8.355e14),
    ("H100", 9.895e14),
    ("H800", 9.895e14),
    ("H20", 1.48e14),
    ("A100", 3.12e14),
    ("A800", 3.12e14),
    ("L40S", 3.62e14),
)


@dataclass(frozen=True)
class Backend:
    """Which implementation does one job, and why."""

    choice: Literal["TE", "Apex", "torch", "DeepSpeed"]
    reason: str

    def __str__(self) -> str:
        return f"{self.choice} ({self.reason})"


def device() -> torch.device:
    """Return the device that this process computes on."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def device_name() -> str:
    """Return the product name, e.g. ``NVIDIA H200``, or the CPU with its core count."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU ({os.cpu_count()} cores)"


def parameter_dtype(precision: Precision) -> torch.dtype:
    """Return the dtype of weights and activations; ``auto`` is bf16 on a GPU, fp32 on a CPU.

    With ``fp8`` they are bf16: only matrix products see FP8.
    """
    if precision == "auto":
        return torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return torch.float32 if precision == "fp32" else torch.bfloat16


def precision_name(precision: Precision) -> str:
    """Return ``fp32``, ``bf16`` or ``fp8``: what the setting means on this machine."""
    if precision == "fp8":
        return "fp8"
    return "bf16" if parameter_dtype(precision) == torch.bfloat16 else "fp32"


def peak_flops(name: str, dtype: torch.dtype) -> float | None:
    """Return the peak FLOP/s of one device, or None where it is not known (then there is no MFU).

    Only bf16 has a table: fp32 runs are for checking, and their peak depends on TF32 settings.
    """
    if dtype != torch.bfloat16:
        return None
    words = name.replace("-", " ").upper()
    for known, flops in _PEAK_BF16_FLOPS:
        if _names(known.upper(), words):
            return flops
    return None


def peak_memory_gib() -> float:
    """Return the most memory this process has held: on the GPU, or resident on a CPU machine."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 2**30


def transformer_impl(
    wanted: Literal["auto", "local", "transformer_engine"], dtype: torch.dtype
) -> Backend:
    """Decide whose layers compute (``train.transformer_impl``).

    Raises:
        ConfigError: Transformer Engine is asked for and cannot run here.
    """
    if wanted == "local":
        return Backend("torch", "train.transformer_impl is local")
    why_not = _why_no_transformer_engine(dtype)
    if why_not is None:
        return Backend("TE", "Transformer Engine is installed")
    if wanted == "transformer_engine":
        raise ConfigError(
            f"train.transformer_impl is transformer_engine, but {why_not}: use local, or auto"
        )
    return Backend("torch", why_not)


def _why_no_transformer_engine(dtype: torch.dtype) -> str | None:
    if not _installed("transformer_engine.pytorch"):
        return "Transformer Engine is not installed"
    if not torch.cuda.is_available():
        return "Transformer Engine needs an NVIDIA GPU, and there is none"
    if dtype == torch.float64:
        return "Transformer Engine does not compute in float64"
    if dtype == torch.float32:
        return "Transformer Engine rounds fp32 products to TF32, and has no fp32 attention kernel"
    try:
        importlib.import_module("transformer_engine.pytorch")
    except (ImportError, OSError) as error:  # a library of another CUDA, a missing part
        return f"Transformer Engine cannot be loaded ({error})"
    return None


def optimizer_backend() -> Backend:
    """Say whose Adam Megatron's optimizer uses: TE's, Apex's or PyTorch's, in this order."""
    if not torch.cuda.is_available():
        return Backend("torch", "there is no GPU")  # runtime/cpu.py sees to it
    if _installed("transformer_engine.pytorch"):
        return Backend("TE", "Transformer Engine is installed")
    if _installed("apex.optimizers"):
        return Backend("Apex", "NVIDIA Apex is installed, Transformer Engine is not")
    return Backend("torch", "neither Transformer Engine nor NVIDIA Apex is installed")


def why_no_apex_products(dtype: torch.dtype) -> str | None:
    """Say why weight gradients cannot be added up inside NVIDIA Apex's products; None if they can.

    Its kernel adds to fp32 buffers; fp32 runs are for checking, and keep PyTorch's arithmetic.
    """
    if not _installed("fused_weight_gradient_mlp_cuda"):
        return "NVIDIA Apex is not installed with its CUDA kernels"
    if not torch.cuda.is_available():
        return "NVIDIA Apex needs an NVIDIA GPU, and there is none"
    if dtype != torch.bfloat16:
        return "it is used in bf16 runs only"
    try:
        importlib.import_module("fused_weight_gradient_mlp_cuda")
    except (ImportError, OSError) as error:  # built for another PyTorch or CUDA
        return f"NVIDIA Apex cannot be loaded ({error})"
    return None


def _names(known: str, words: str) -> bool:
    """Whether the words contain the known name as whole words (H20 is not H200)."""
    return f" {known} " in f" {words} "


def _installed(module: str) -> bool:
    # PyPI's "apex" is another package: asking for the submodule tells them apart.
    parent = module.partition(".")[0]
    return importlib.util.find_spec(parent) is not None and (
        importlib.util.find_spec(module) is not None
    )
