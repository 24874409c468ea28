"""Prompts into the cache: loop 1 over every slot, later loops over the last slots only, exactly.

Later loops see the past only through loop 1's keys and values, which loop 1 has left for every
slot, and through their own last w - 1 slots. What the last slot's logits and the rings need of
N layers therefore begins N (w - 1) slots before the end; each loop before it one slot and another
N (w - 1) earlier:

    slot        0 ................................................ n
    loop 1      #################################################      every slot
    loop 2                                    ###################      2 (N (w - 1)) + 2
    loop 3                                             ##########      N (w - 1) + 1

Slots at the front of such a suffix see too little and hold wrong values; nothing that is kept
depends on them, and w - 1 of them are left out after every layer. Logits and caches are those of
running every loop over every slot.

Rows of all sequences lie one after another (no padding); only attention goes sequence by sequence.
Long prompts run in pieces (``chunk_slots`` rows at a time), so memory does not grow with them.

Letters: b sequences, t rows, a rows of one piece of one sequence, d hidden, h query heads, g KV
heads, n slots, w slots of a window, k head size, N layers, j experts of a row (top-k), v
vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from pltmoe.config import ModelConfig
from pltmoe.errors import DataError
from pltmoe.inference.cache import StaticCache
from pltmoe.inference.model import PLTDecoder, Routes
from pltmoe.model.sdpa import attend_fused, without_cudnn

CHUNK_SLOTS = 8192
"""Rows that run through the stack together."""
MASK_ROWS = 1024
"""Query rows of one explicit mask."""


@dataclass(frozen=True)
class Span:
    """Slots from ``start`` to before ``stop`` of one sequence."""

    sequence: int
    start: int
    stop: int

    def __len__(self) -> int:
        """Return the number of slots."""
        return self.stop - self.start


@dataclass
class _Rows:
    """What a loop leaves for the next one, of one sequence from slot ``start`` on."""

    start: int
    h_ad: Tensor
    chosen: Tensor | None
    """Shared routing: loop 1's experts [a, N, j]."""


def slots_needed(m: ModelConfig, outputs: int = 1, keys_cached: bool = False) -> list[int | None]:
    """Return how many of the last slots each loop must run; None: every slot.

    Args:
        m: the model.
        outputs: last slots whose logits are wanted.
        keys_cached: the keys and values of all loops that keep them all are there already (the
            cache was cut back), only rings and hidden vectors have to be found again.
    """
    if not m.share_first_loop_kv and not keys_cached:
        return [None] * m.num_loops
    reach = m.num_layers * (m.window_keys - 1) if m.gated_swa else 0
    needed = [reach + outputs]
    for _ in range(m.num_loops - 1):
        needed.insert(0, reach + needed[0] + (1 if m.cross_loop_shift else 0))
    if not keys_cached:
        return [None, *needed[1:]]
    return [needed[0] - reach, *needed[1:]]


@torch.no_grad()
@without_cudnn()
def prefill(
    decoder: PLTDecoder,
    cache: StaticCache,
    prompts: Sequence[Sequence[int]],
    outputs: int = 1,
    chunk_slots: int = CHUNK_SLOTS,
) -> Tensor:
    """Append one prompt to each sequence of the cache, also to one that holds something already.

    Args:
        decoder: the model.
        cache: filled in place; ``lengths_b`` grows by each prompt's length.
        prompts: token ids, one non-empty list per sequence, of any lengths.
        outputs: logits of so many last slots; every prompt must be as long.
        chunk_slots: rows that run together.

    Returns:
        Logits [b, v] of the last slot, or [b, outputs, v] with ``outputs`` > 1.

    Raises:
        DataError: an empty prompt, or one that does not fit into the cache.
    """
    past = cache.lengths_b.tolist()
    _check(cache, prompts, past, outputs)
    whole = [
        Span(index, start, start + len(prompt))
        for index, (start, prompt) in enumerate(zip(past, prompts, strict=True))
    ]
    run = _Prefill(decoder, cache, whole, prompts, chunk_slots)
    h_bod = run.all_loops(slots_needed(decoder.m, outputs), outputs)
    cache.lengths_b.copy_(torch.tensor([span.stop for span in whole]))
    logits = decoder.logits(h_bod)
    return logits[:, 0] if outputs == 1 else logits


@torch.no_grad()
@without_cudnn()
def cut_back(
    decoder: PLTDecoder, cache: StaticCache, texts: Sequence[Sequence[int]], length: int
) -> None:
    """Cut every sequence of the cache back to its first ``length`` slots, exactly.

    Loop 1's keys and values stay. The rings and hidden vectors of that time are gone, so the last
    slots before ``length`` run again: 1 + (L - 1) (N (w - 1) + 1), not the text.

    Args:
        decoder: the model.
        cache: changed in place.
        texts: what each sequence holds: at least ``length`` token ids.
        length: slots to keep.

    Raises:
        DataError: a sequence is shorter.
    """
    if any(held < length for held in cache.lengths_b.tolist()) or min(map(len, texts)) < length:
        raise DataError(f"the cache cannot be cut back to {length} slots: a sequence is shorter")
    m = decoder.m
    if length == 0 or m.num_loops == 1:
        cache.lengths_b.fill_(length)
        cache.handed_on_bld.mul_(min(length, 1))
        return
    needed = slots_needed(m, keys_cached=True)
    first = max(length - (needed[0] or 0), 0)
    if first == 0:
        cache.handed_on_bld.zero_()
    whole = [Span(index, first, length) for index in range(cache.batch)]
    tails = [list(text[first:length]) for text in texts]
    # Rings and hidden vectors are of a later slot now; the first rows read them in vain.
    _Prefill(decoder, cache, whole, tails, CHUNK_SLOTS).all_loops(needed, 1)
    cache.lengths_b.fill_(length)


def _check(
    cache: StaticCache, prompts: Sequence[Sequence[int]], past: list[int], outputs: int
) -> None:
    if len(prompts) != cache.batch:
        raise DataError(f"{len(prompts)} prompts for a cache of {cache.batch} sequences")
    for index, (prompt, start) in enumerate(zip(prompts, past, strict=True)):
        if len(prompt) < max(outputs, 1):
            raise DataError(f"prompt {index + 1} is empty or too short: {len(prompt)} tokens")
        if start + len(prompt) > cache.capacity:
            raise DataError(
                f"prompt {index + 1} needs {start + len(prompt)} slots, but the cache has "
                f"{cache.capacity}: make it larger"
            )


class _Prefill:
    """One call: loop after loop over its spans, chunk after chunk."""

    def __init__(
        self,
        decoder: PLTDecoder,
        cache: StaticCache,
        whole: list[Span],
        prompts: Sequence[Sequence[int]],
        chunk_slots: int,
    ):
        self.decoder, self.cache, self.whole = decoder, cache, whole
        self.chunk_slots = chunk_slots
        device = cache.lengths_b.device
        self.prompts = [torch.as_tensor(prompt, device=device) for prompt in prompts]

    def all_loops(self, needed: list[int | None], outputs: int) -> Tensor:
        """Run all loops; return H_L of the last slots [b, outputs, d]."""
        rows: list[_Rows] = []
        for loop, slots in enumerate(needed, start=1):
            spans = [self._suffix(span, slots) for span in self.whole]
            following = needed[loop] if loop < len(needed) else outputs
            shift = self.decoder.m.cross_loop_shift and loop < len(needed)
            keep = None if following is None else following + (1 if shift else 0)
            narrow = keep if slots is not None and loop > 1 else None
            rows = self._loop(loop, spans, rows, keep, narrow)
        return torch.stack([r.h_ad[-outputs:] for r in rows])

    @staticmethod
    def _suffix(whole: Span, slots: int | None) -> Span:
        if slots is None:
            return whole
        return replace(whole, start=max(whole.start, whole.stop - slots))

    def _loop(
        self,
        loop: int,
        spans: list[Span],
        before: list[_Rows],
        keep: int | None,
        narrow: int | None,
    ) -> list[_Rows]:
        """Run one loop over spans; return what the next one needs: the last ``keep`` slots.

        ``narrow`` is how many outputs are wanted where the layers may leave slots out.
        """
        inputs = [self._input(loop, span, before) for span in spans]
        lent = [self._lent(span, before) for span in spans]
        h_parts: list[list[Tensor]] = [[] for _ in spans]
        chosen_parts: list[list[Tensor]] = [[] for _ in spans]
        for chunk in _chunks(spans, self.chunk_slots):
            cut = [slice(s.start - spans[s.sequence].start, s.stop - spans[s.sequence].start)
                   for s in chunk]  # fmt: skip
            x_td = torch.cat([inputs[s.sequence][c] for s, c in zip(chunk, cut, strict=True)])
            routes = self._routes(loop, chunk, cut, lent)
            attend = _SpanAttention(self.cache, loop, chunk, spans, narrow)
            h_td = self._stack(loop, chunk, x_td, routes, attend)
            for s, h in zip(chunk, h_td.split([len(s) for s in attend.spans]), strict=True):
                h_parts[s.sequence].append(h)
            if routes.kept:
                sizes = [len(s) for s in chunk]
                for s, c in zip(chunk, torch.stack(routes.kept, 1).split(sizes), strict=True):
                    chosen_parts[s.sequence].append(c)
        return [
            _tail(span, torch.cat(h), torch.cat(c) if c else _chosen(span, before), keep)
            for span, h, c in zip(spans, h_parts, chosen_parts, strict=True)
        ]

    def _input(self, loop: int, span: Span, before: list[_Rows]) -> Tensor:
        """Return a loop's input [a, d] and keep what it handed on at the last slot."""
        decoder, cache = self.decoder, self.cache
        if loop > 1 and not decoder.m.cross_loop_shift:
            rows = before[span.sequence]
            return rows.h_ad[span.start - rows.start :]
        first = span.start - self.whole[span.sequence].start
        e_ad = decoder.embed(self.prompts[span.sequence][first:])
        if loop == 1:
            return e_ad
        rows = before[span.sequence]
        handed_on_ad = decoder.hand_on(rows.h_ad)
        earlier_d = cache.handed_on_bld[span.sequence, loop - 2]
        padded = torch.cat([earlier_d[None], handed_on_ad])  # row i: slot rows.start + i - 1
        moved_ad = padded[span.start - rows.start : -1]
        earlier_d.copy_(handed_on_ad[-1])
        return decoder.between_loops(e_ad, moved_ad)

    def _lent(self, span: Span, before: list[_Rows]) -> Tensor | None:
        chosen = before[span.sequence].chosen if before else None
        return None if chosen is None else chosen[span.start - before[span.sequence].start :]

    def _routes(
        self, loop: int, chunk: list[Span], cut: list[slice], lent: list[Tensor | None]
    ) -> Routes:
        kernels = self.decoder.kernels
        if not self.decoder.shares_routing:
            return Routes(kernels)
        if loop == 1:
            return Routes(kernels, keep=True)
        parts = [lent[s.sequence][c] for s, c in zip(chunk, cut, strict=True)]  # type: ignore[index]
        return Routes(kernels, lent=list(torch.cat(parts).unbind(1)))

    def _stack(
        self,
        loop: int,
        chunk: list[Span],
        x_td: Tensor,
        routes: Routes,
        attend: "_SpanAttention",
    ) -> Tensor:
        slots = [torch.arange(s.start, s.stop, device=x_td.device) for s in chunk]
        rope = self.decoder.rope(torch.cat(slots))
        return self.decoder.stack(x_td, rope, attend, routes)


class _SpanAttention:
    """Attention of the rows of some spans in one loop; writes the cache.

    Args:
        cache: of the batch.
        loop: from 1.
        spans: what the rows are.
        whole: every sequence's span in this loop.
        narrow: after the last layer so many slots are needed, and before each layer w - 1 more;
            earlier ones are left out. None: all go on.
    """

    def __init__(
        self,
        cache: StaticCache,
        loop: int,
        spans: list[Span],
        whole: list[Span],
        narrow: int | None,
    ):
        self.cache, self.loop, self.spans = cache, loop, spans
        self._row_t: Tensor | None = None
        self._narrow = narrow
        # Where a span runs in pieces, later pieces need the rings that earlier ones leave.
        self._is_whole = [s == whole[s.sequence] for s in spans]

    def rows_after(self, layer: int) -> Tensor | None:
        """Return which rows go on; None: all."""
        return self._row_t

    def __call__(
        self, layer: int, q_thk: Tensor, k_tgk: Tensor, v_tgk: Tensor, gate_th: Tensor | None
    ) -> Tensor:
        parts, kept, start = [], [], 0
        spans = self._spans_after(layer)
        for span, left in zip(self.spans, spans, strict=True):
            stop = start + len(span)
            rows = slice(stop - len(left), stop)
            q = q_thk[rows].transpose(0, 1)[None]
            k, v = (x[start:stop].transpose(0, 1)[None] for x in (k_tgk, v_tgk))
            y = self._everything(layer, span, q, k, v)
            if self.loop > 1 and gate_th is not None:
                gate = gate_th[rows].t()[None, ..., None]
                y = torch.lerp(y, self._window(layer, span, q, k, v), gate)
            parts.append(y[0].transpose(0, 1))
            kept.append(torch.arange(rows.start, stop, device=q.device))
            start = stop
        self._row_t = torch.cat(kept) if spans != self.spans else None
        self.spans = spans
        return torch.cat(parts)

    def _spans_after(self, layer: int) -> list[Span]:
        if self._narrow is None or not self.cache.m.gated_swa:
            return self.spans
        reach = self.cache.m.window_keys - 1
        needed = (self.cache.m.num_layers - 1 - layer) * reach + self._narrow
        return [
            replace(s, start=max(s.start, s.stop - needed)) if is_whole else s
            for s, is_whole in zip(self.spans, self._is_whole, strict=True)
        ]

    def _everything(self, layer: int, span: Span, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        all_k, all_v = (x[span.sequence, None] for x in self.cache.full(layer, self.loop))
        if self.loop == 1 or not self.cache.m.share_first_loop_kv:
            all_k[:, :, span.start : span.stop] = k
            all_v[:, :, span.start : span.stop] = v
        return attend_causally(q, all_k[:, :, : span.stop], all_v[:, :, : span.stop])

    def _window(self, layer: int, span: Span, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend to the last w slots of this loop; keep the last of them in the ring."""
        size, reach = self.cache.window, self.cache.m.window_keys
        ring_k = self.cache.ring_k[layer][span.sequence, self.loop - 2]
        ring_v = self.cache.ring_v[layer][span.sequence, self.loop - 2]
        # Where a suffix begins the ring holds older slots: numbers as wrong as any others there.
        first = max(span.start - (reach - 1), 0)
        past = torch.arange(first, span.start, device=q.device) % size
        keys = torch.cat([ring_k[:, past][None], k], 2)
        values = torch.cat([ring_v[:, past][None], v], 2)
        kept = torch.arange(max(span.start, span.stop - size), span.stop, device=q.device)
        ring_k[:, kept % size] = k[0, :, kept - span.start]
        ring_v[:, kept % size] = v[0, :, kept - span.start]
        return attend_in_window(q, keys, values, reach)


def attend_causally(q_1hak: Tensor, k_1gnk: Tensor, v_1gnk: Tensor) -> Tensor:
    """Attend from the last ``a`` of ``n`` slots to all slots up to each."""
    rows, slots = q_1hak.size(2), k_1gnk.size(2)
    if rows == slots or rows == 1:
        return attend_fused(q_1hak, k_1gnk, v_1gnk, is_causal=rows > 1)
    if not q_1hak.is_cuda:
        return attend_in_window(q_1hak, k_1gnk, v_1gnk, slots)
    return attend_fused(q_1hak, k_1gnk, v_1gnk, attn_mask=causal_lower_right(rows, slots))


def attend_in_window(q_1hak: Tensor, k_1gnk: Tensor, v_1gnk: Tensor, window_keys: int) -> Tensor:
    """Attend from the last ``a`` of ``n`` slots to the last ``window_keys`` up to each."""
    rows, slots = q_1hak.size(2), k_1gnk.size(2)
    k_1hnk, v_1hnk = _for_every_head(q_1hak, k_1gnk, v_1gnk)
    past, parts = slots - rows, []
    step = max(256, window_keys) if window_keys < slots else MASK_ROWS
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        first = max(past + start - (window_keys - 1), 0)
        query = torch.arange(past + start, past + stop, device=q_1hak.device)[:, None]
        distance = query - torch.arange(first, past + stop, device=q_1hak.device)
        keys = slice(first, past + stop)
        parts.append(
            F.scaled_dot_product_attention(
                q_1hak[:, :, start:stop],
                k_1hnk[:, :, keys],
                v_1hnk[:, :, keys],
                attn_mask=(distance >= 0) & (distance < window_keys),
            )
        )
    return torch.cat(parts, 2)


def _for_every_head(q_1hak: Tensor, k_1gnk: Tensor, v_1gnk: Tensor) -> tuple[Tensor, Tensor]:
    """Repeat KV heads once, for all pieces: masked, grouped attention is slow on GPUs."""
    repeat = q_1hak.size(1) // k_1gnk.size(1)
    if repeat == 1:
        return k_1gnk, v_1gnk
    return k_1gnk.repeat_interleave(repeat, 1), v_1gnk.repeat_interleave(repeat, 1)


def _chunks(spans: list[Span], size: int) -> list[list[Span]]:
    """Cut spans into groups of at most ``size`` rows, those that fit into a group not at all."""
    groups: list[list[Span]] = [[]]
    room = size
    for span in spans:
        start = span.start
        if room < len(span) <= size:
            groups.append([])
            room = size
        while start < span.stop:
            if room == 0:
                groups.append([])
                room = size
            stop = min(span.stop, start + room)
            groups[-1].append(Span(span.sequence, start, stop))
            room -= stop - start
            start = stop
    return groups


def _chosen(span: Span, before: list[_Rows]) -> Tensor | None:
    """Later loops hand loop 1's choice on to the loop after them."""
    if not before or before[span.sequence].chosen is None:
        return None
    rows = before[span.sequence]
    return rows.chosen[span.start - rows.start :]  # type: ignore[index]


def _tail(span: Span, h_ad: Tensor, chosen: Tensor | None, keep: int | None) -> _Rows:
    kept = h_ad.size(0) if keep is None else min(h_ad.size(0), keep)
    return _Rows(span.stop - kept, h_ad[-kept:], None if chosen is None else chosen[-kept:])
