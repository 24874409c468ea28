"""Which implementation of attention and experts a device runs: Triton kernels or plain PyTorch."""

import importlib.util
import logging
from functools import cache

import torch

from pltmoe.inference.model import Kernels

logger = logging.getLogger(__name__)
LEAST_CAPABILITY = (8, 0)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@cache
def choose_kernels(device: torch.device, dtype: torch.dtype) -> Kernels:
    """Return the fast kernels where they can run, else the plain ones; log it once."""
    reason = why_plain(device, dtype)
    if reason is not None:
        kernels = Kernels(reason=f"plain PyTorch: {reason}")
    else:
        # Triton exists only where it can run: it is imported when it is chosen.
        from pltmoe.inference.kernels.decode_attention import decode_attention
        from pltmoe.inference.kernels.experts import experts
        from pltmoe.inference.kernels.rows import choose, project, store

        reason = f"Triton kernels on {device}, {dtype}"
        kernels = Kernels(
            decode_attention, experts, project, store, choose, reason, capturable=True
        )
    logger.info("decode attention and experts: %s", kernels.reason)
    return kernels


def why_plain(device: torch.device, dtype: torch.dtype) -> str | None:
    """Say why the Triton kernels cannot run there, or return None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if dtype not in DTYPES:
        return f"the kernels do not compute in {str(dtype).removeprefix('torch.')}"
    if device.type != "cuda":
        return f"the kernels need an NVIDIA GPU, this is a {device.type} device"
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        return f"compute capability {capability[0]}.{capability[1]} is below 8.0"
    return None
