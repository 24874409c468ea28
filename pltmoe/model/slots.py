"""Which slots of the sequences this process holds, and how it sees those before them.

One process holds all of them. Where sequences are cut between ranks, ``parallel/slots.py`` has the
same class over process groups; the model only asks.

Letters: s slots, b sequences, d hidden size, n slots of one segment.
"""

from typing import Protocol

import torch
from torch import Tensor

from pltmoe.model.cross_loop import shift_slots


class Slots(Protocol):
    """The slots of a process: ``segments`` for attention, maybe fewer for the residual stream."""

    total: int | None
    """Slots of a whole sequence; None where the model may be called with any length."""
    segments: tuple[tuple[int, int], ...] | None
    """Runs [start, stop) of slots that attention sees here; None for the whole sequence."""

    def shift(self, h_sbd: Tensor) -> Tensor:
        """Move the residual stream one slot to the right; slot 0 gets zeros."""
        ...

    def residual(self, x_sb: Tensor) -> Tensor:
        """Cut what is known for attention's slots [s, b] to those of the residual stream."""
        ...

    def with_past(self, x_s: Tensor, reach: int | None) -> list[Tensor]:
        """Put up to ``reach`` (None: all) earlier slots before each segment: [past + n, ...]."""
        ...

    def rope(self, angles_s: Tensor) -> Tensor:
        """Pick the rows of attention's slots from those of a whole sequence."""
        ...


class AllSlots:
    """Whole sequences in one process."""

    total = None
    segments = None

    def shift(self, h_sbd: Tensor) -> Tensor:
        """See ``Slots``."""
        return shift_slots(h_sbd, 0)

    def residual(self, x_sb: Tensor) -> Tensor:
        """See ``Slots``."""
        return x_sb

    def with_past(self, x_s: Tensor, reach: int | None) -> list[Tensor]:
        """See ``Slots``."""
        return [x_s]

    def rope(self, angles_s: Tensor) -> Tensor:
        """See ``Slots``."""
        return angles_s


def starts_document(position_ids_bs: Tensor) -> Tensor:
    """Return [s, b], true where a document begins: where positions are 0."""
    return (position_ids_bs == 0).transpose(0, 1).to(torch.bool)
