"""Sequences cut between ranks: who holds which slots, and how the few that are missing travel.

Context parallelism gives each of CP ranks two chunks, mirrored, so that causal attention is even
work. Sequence parallelism cuts the residual stream of a context-parallel rank again, into TP runs:

    CP2, 8 slots            rank 0: 0 1 . . . . 6 7          rank 1: 2 3 4 5
    and TP2 with SP         tp 0: 0 1   tp 1: 6 7            tp 0: 2 3   tp 1: 4 5

The shift needs the one slot before each run; the window the w-1 before each chunk; attention over
the whole past all of them. ``SlotExchange`` sends exactly those, in one all-to-all, and sends their
gradients back.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from pltmoe.parallel.layout import Layout


def context_segments(total: int, size: int, rank: int) -> tuple[tuple[int, int], ...]:
    """Return the runs [start, stop) of slots that a context-parallel rank attends from."""
    if size == 1:
        return ((0, total),)
    chunk = total // (2 * size)
    mirrored = 2 * size - 1 - rank
    return ((rank * chunk, (rank + 1) * chunk), (mirrored * chunk, (mirrored + 1) * chunk))


def slots_of(segments: Sequence[tuple[int, int]]) -> list[int]:
    """List the slots of some runs."""
    return [slot for start, stop in segments for slot in range(start, stop)]


def cut_slots(total: int, layout: Layout, rank: int) -> tuple[list[int], list[int]]:
    """Return how ``rank`` holds sequences: (attention's slots, the residual stream's slots)."""
    where = layout.coordinates(rank)
    attention = slots_of(context_segments(total, layout.context_parallel_size, where.context))
    if not layout.sequence_parallel:
        return attention, attention
    run = len(attention) // layout.tensor_parallel_size
    return attention, attention[where.tensor * run : (where.tensor + 1) * run]


def missing_before(held: Sequence[int], reach: int | None) -> list[int]:
    """Return the slots that are not held and lie at most ``reach`` (None: anyhow) before one."""
    here = set(held)
    wanted: set[int] = set()
    for slot in held:
        if slot - 1 not in here:  # the first of a run
            wanted.update(range(0 if reach is None else max(0, slot - reach), slot))
    return sorted(wanted - here)


class SlotExchange:
    """Fetches slots from the ranks that hold them; each rank asks for its own list."""

    def __init__(
        self, held: Sequence[Sequence[int]], wanted: Sequence[Sequence[int]], rank: int, group: Any
    ):
        """Work out the routes; every rank of ``group`` must come with the same lists.

        Args:
            held: the slots of each rank of the group, in the order of its tensors.
            wanted: the slots that each rank asks for.
            rank: this rank within the group.
            group: process group.
        """
        self.group = group
        owner = {
            slot: (index, place)
            for index, slots in enumerate(held)
            for place, slot in enumerate(slots)
        }
        ranks = range(len(held))
        sends = [[owner[s][1] for s in wanted[to] if owner[s][0] == rank] for to in ranks]
        self.send_counts = [len(places) for places in sends]
        self.send_places = torch.tensor([p for places in sends for p in places], dtype=torch.long)
        by_owner = sorted(range(len(wanted[rank])), key=lambda i: (owner[wanted[rank][i]][0], i))
        sources = [owner[slot][0] for slot in wanted[rank]]
        self.receive_counts = [sources.count(source) for source in ranks]
        # Position in what arrives (sorted by sender) of each wanted slot, and back.
        self.arrival = torch.tensor(by_owner, dtype=torch.long).argsort()
        self.order = torch.tensor(by_owner, dtype=torch.long)

    def __call__(self, x_s: Tensor) -> Tensor:
        """Return the wanted slots [n, ...] from tensors with slots first."""
        return _Exchange.apply(x_s, self)

    def to(self, device: torch.device) -> "SlotExchange":
        """Move the index lists to where the tensors are."""
        for name in ("send_places", "arrival", "order"):
            setattr(self, name, getattr(self, name).to(device))
        return self


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_s: Tensor, routes: SlotExchange) -> Tensor:
        ctx.routes, ctx.slots = routes, x_s.size(0)
        out = x_s.index_select(0, routes.send_places)
        got = _all_to_all(out, routes.receive_counts, routes.send_counts, routes.group)
        return got.index_select(0, routes.arrival)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        routes, (gradient,) = ctx.routes, gradients
        out = gradient.index_select(0, routes.order)
        got = _all_to_all(out, routes.send_counts, routes.receive_counts, routes.group)
        whole = gradient.new_zeros(ctx.slots, *gradient.shape[1:])
        return whole.index_add_(0, routes.send_places, got), None


def _all_to_all(out: Tensor, receive: list[int], send: list[int], group: Any) -> Tensor:
    got = out.new_empty(sum(receive), *out.shape[1:])
    dist.all_to_all_single(got, out.contiguous(), receive, send, group=group)
    return got


class CutSlots:
    """``model.slots.Slots`` over process groups: context parallelism, sequence parallelism."""

    def __init__(
        self, total: int, layout: Layout, groups: ProcessGroupCollection, device: torch.device
    ):
        """``total`` is the number of slots of a whole sequence."""
        self.total, self._layout, self._groups, self._device = total, layout, groups, device
        rank = dist.get_rank()
        attention, residual = cut_slots(total, layout, rank)
        where = layout.coordinates(rank)
        cp = layout.context_parallel_size
        self.segments = context_segments(total, cp, where.context) if cp > 1 else None
        self._index = torch.tensor(attention, device=device)
        run = len(residual)
        begin = where.tensor * run if layout.sequence_parallel else 0
        self._residual = (begin, run)
        # Without sequence parallelism every tensor-parallel rank holds the same slots.
        self._stream_group = groups.tp_cp if layout.sequence_parallel else groups.cp
        self._past: dict[int | None, tuple[SlotExchange, list[Tensor]]] = {}
        self._shift, (self._before,) = self._route(self._stream_group, 1, 1)

    def shift(self, h_sbd: Tensor) -> Tensor:
        """Move the residual stream one slot to the right; slot 0 gets zeros."""
        zero = torch.zeros_like(h_sbd[:1])
        return torch.cat([h_sbd, self._shift(h_sbd), zero]).index_select(0, self._before)

    def residual(self, x_sb: Tensor) -> Tensor:
        """Cut what is known for attention's slots [s, b] to those of the residual stream."""
        return x_sb.narrow(0, *self._residual)

    def rope(self, angles_s: Tensor) -> Tensor:
        """Pick the rows of attention's slots from those of a whole sequence."""
        return angles_s if self.segments is None else angles_s.index_select(0, self._index)

    def take(self, x_bs: Tensor) -> Tensor:
        """Pick attention's slots from whole sequences [b, s]."""
        return x_bs if self.segments is None else x_bs.index_select(1, self._index)

    def with_past(self, x_s: Tensor, reach: int | None) -> list[Tensor]:
        """Put up to ``reach`` (None: all) earlier slots before each segment: [past + n, ...]."""
        if reach not in self._past:
            self._past[reach] = self._route(self._groups.cp, 0, reach)
        exchange, places = self._past[reach]
        together = torch.cat([x_s, exchange(x_s)])
        return [together.index_select(0, place) for place in places]

    def _route(self, group: Any, stream: int, reach: int | None) -> tuple[SlotExchange, list[Any]]:
        """Plan an exchange of attention's (0) or the residual stream's (1) slots.

        Returns it with the places, in [own slots, fetched slots, zero], of each segment with its
        past (0), or of the slot before each own slot (1).
        """
        members = dist.get_process_group_ranks(group)
        held = [cut_slots(self.total, self._layout, rank)[stream] for rank in members]
        wanted = [missing_before(slots, reach) for slots in held]
        me = members.index(dist.get_rank())
        place = {slot: index for index, slot in enumerate([*held[me], *wanted[me]])}
        if stream:
            rows = [[place.get(slot - 1, len(place)) for slot in held[me]]]
        else:
            rows = [
                [place[s] for s in range(0 if reach is None else max(0, start - reach), stop)]
                for start, stop in self.segments or ()
            ]
        exchange = SlotExchange(held, wanted, me, group).to(self._device)
        return exchange, [torch.tensor(row, device=self._device) for row in rows]
