"""What a decode step has to move: weights, distinct experts, keys and values. And what a copy can.

Activations are left out: they stay in the device's caches.
"""

import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from pltmoe.config import ModelConfig
from pltmoe.inference.engine import Session

OF_AN_EXPERT = ("gate_up_efd", "down_edf", "gate_up_scale_ef", "down_scale_ed")


def copy_bytes_per_second(device: torch.device) -> float:
    """Measure copies in the device's memory for half a second: bytes read and written, the best."""
    # Many at once on a GPU: launching one takes as long as 3 % of it.
    size, copies = (2**30, 16) if device.type == "cuda" else (2**28, 1)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target, best, started = torch.empty_like(source), float("inf"), time.perf_counter()
    while time.perf_counter() - started < 0.5 or best == float("inf"):
        best = min(best, timed(lambda: [target.copy_(source) for _ in range(copies)], device))
    return 2 * size * copies / best


def clock(device: torch.device) -> Callable[[], float]:
    """Return what seconds are read from: on one CPU thread, the time that the process had it.

    Whatever else runs on the machine then takes no part in a measurement.
    """
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    return time.process_time if alone else time.perf_counter


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that ``work`` takes, the device's included."""
    synchronize(device)
    seconds = clock(device)
    started = seconds()
    work()
    synchronize(device)
    return seconds() - started


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class ExpertCounter:
    """Counts distinct experts of every call while a session's model runs through it."""

    def __init__(self, session: Session):
        self._decoder = session.decoder
        self._kernels = session.decoder.kernels
        self.calls: list[int] = []

    def __enter__(self) -> "ExpertCounter":
        self._decoder.kernels = replace(self._kernels, experts=self._count, capturable=False)
        return self

    def __exit__(self, *_: object) -> None:
        self._decoder.kernels = self._kernels

    def _count(self, x_td: Tensor, expert_te: Tensor, *rest: Tensor) -> Tensor:
        self.calls.append(expert_te.unique().numel())
        return self._kernels.experts(x_td, expert_te, *rest)


def passes(m: ModelConfig) -> int:
    """Return forward passes per token: one with the cross-loop shift, else one per loop."""
    return 1 if m.cross_loop_shift else m.num_loops


def bytes_moved(session: Session, context: int, experts_read: float) -> float:
    """Return the bytes that one step must move at a context of so many slots.

    Args:
        session: the model and its batch.
        context: slots in the cache, the current one included.
        experts_read: distinct experts, summed over layers and passes.
    """
    m, weights = session.decoder.m, session.decoder.weights
    size = weights.embedding_vd.element_size()
    dense, expert = 0, 0
    for layer in weights.layers:
        for name, x in vars(layer).items():
            if x is not None and name in OF_AN_EXPERT:
                expert += x[0].numel() * x.element_size()
            elif x is not None:
                dense += x.numel() * x.element_size()
    head = weights.head_vd.numel() * size + session.batch * m.hidden_size * size
    slot = 2 * m.num_layers * m.num_kv_heads * m.head_dim * size
    reads = passes(m) if m.share_first_loop_kv else m.num_loops
    slots = reads * context + m.num_loops  # and one written by each loop
    if m.gated_swa:
        slots += (m.num_loops - 1) * min(m.window_keys, context)
    return (
        dense * passes(m)
        + head
        + experts_read * expert / m.num_layers
        + session.batch * slots * slot
    )
