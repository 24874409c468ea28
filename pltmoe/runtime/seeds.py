"""All random number generators of a process: seeding them, saving them, restoring them.

The model itself draws nothing (no dropout) and data order is a pure function of the seed, so the
state saved here only matters for whatever is added later; it is saved so that it cannot be missed.
"""

import logging
import os
import random
from typing import Any

import numpy as np
import torch

logger = logging.getLogger(__name__)


def seed_everything(seed: int, deterministic: bool = False) -> None:
    """Seed Python, NumPy, PyTorch and Megatron's tracker; call it after the groups exist.

    Args:
        seed: the same on every rank.
        deterministic: let a GPU use only kernels that repeat bit for bit (slower). Set before
            the first matrix product, because cuBLAS reads its setting once.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"  # Transformer Engine's switch
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def random_state() -> dict[str, Any]:
    """Return the state of every generator as plain types and tensors."""
    name, keys, *position = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), *position),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(),
        "megatron": _tracker().get_states(),
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Put every generator back to what ``random_state`` returned.

    The generators of a GPU and those that stand in for them on a CPU are of different kinds: from
    a checkpoint of the other kind of machine they keep their seeds.
    """
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *position = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *position))
    torch.set_rng_state(state["torch"])
    if state["cuda"].shape != torch.cuda.get_rng_state().shape:
        logger.warning("the device's random state is of another kind of device: it is seeded anew")
        return
    torch.cuda.set_rng_state(state["cuda"])
    _tracker().set_states(state["megatron"])


def _tracker() -> Any:
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    return get_cuda_rng_tracker()
