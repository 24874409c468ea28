"""The cache of a batch: allocated once, filled in place, with one length per sequence.

    slot           0   1   2   3   4   5   6   7
    loop 1         K   K   K   K   K   K   K   .     every slot
    loop 2                     k   k   k   k         a ring: the last w slots (slot i at i mod w)
    H_1                                    H         one vector: what loop 2 reads at the next slot

Sequences lie left-aligned, so a batch of unequal lengths needs no padding: each has its own length.
Bytes are those of ``config.counts.kv_cache_bytes``: the paper's formula and the hidden vectors.

Letters: b sequences, L loops, l later loops (L - 1), g KV heads, n slots, w slots of the ring, k
head size, d hidden.
"""

import torch
from torch import Tensor

from pltmoe.config import ModelConfig


class StaticCache:
    """Keys, values and hidden vectors of ``batch`` sequences of up to ``capacity`` slots.

    ``lengths_b`` counts the slots that are filled. ``full_k[loop - 1][layer]`` is ``[b, g, n, k]``;
    where loop 1 is shared there is one loop. ``ring_k[layer]`` is ``[b, l, g, w, k]``, or the list
    is empty without G-SWA. ``handed_on_bld`` is what each loop but the last handed on to the next
    slot (normed if the model norms between loops), zeros where nothing came before.
    """

    def __init__(
        self,
        m: ModelConfig,
        batch: int,
        capacity: int,
        device: torch.device | str,
        dtype: torch.dtype,
    ):
        self.m, self.batch, self.capacity = m, batch, capacity
        options = {"device": device, "dtype": dtype}
        loops = 1 if m.share_first_loop_kv else m.num_loops
        # Loops beside each other in memory: one call can attend in all loops of all sequences.
        shape = (batch, loops, m.num_kv_heads, capacity, m.head_dim)
        self._full = [
            (torch.zeros(shape, **options), torch.zeros(shape, **options))
            for _ in range(m.num_layers)
        ]
        self.window = min(m.window_keys, capacity)
        self.ring_k: list[Tensor] = []
        self.ring_v: list[Tensor] = []
        if m.gated_swa:
            shape = (batch, m.num_loops - 1, m.num_kv_heads, self.window, m.head_dim)
            self.ring_k = [torch.zeros(shape, **options) for _ in range(m.num_layers)]
            self.ring_v = [torch.zeros(shape, **options) for _ in range(m.num_layers)]
        hidden = m.num_loops - 1 if m.cross_loop_shift else 0
        self.handed_on_bld = torch.zeros(batch, hidden, m.hidden_size, **options)
        self.lengths_b = torch.zeros(batch, dtype=torch.int64, device=device)

    def full(self, layer: int, loop: int) -> tuple[Tensor, Tensor]:
        """Return keys and values [b, g, n, k] that ``loop`` (from 1) attends to in a layer."""
        index = 0 if self.m.share_first_loop_kv else loop - 1
        k, v = self._full[layer]
        return k[:, index], v[:, index]

    def full_of_all_loops(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return keys and values [b, L, g, n, k]; L is 1 where loop 1 is shared."""
        return self._full[layer]

    def num_bytes(self) -> int:
        """Return the bytes of keys, values and hidden vectors."""
        return sum(x.numel() * x.element_size() for x in self.tensors())

    def reset(self) -> None:
        """Forget everything: a new batch begins."""
        self.lengths_b.zero_()
        self.handed_on_bld.zero_()

    def reorder(self, source_b: Tensor) -> None:
        """Let sequence i continue what sequence ``source_b[i]`` was (beam search, copies)."""
        for x in (*self.tensors(), self.lengths_b):
            x.copy_(x.index_select(0, source_b.to(x.device)))

    def tensors(self) -> list[Tensor]:
        """Return keys, values and hidden vectors."""
        full = [x for pair in self._full for x in pair]
        return [*full, *self.ring_k, *self.ring_v, self.handed_on_bld]


def store(
    k_bLgk: Tensor,
    v_bLgk: Tensor,
    to_k_bgnk: Tensor,
    to_v_bgnk: Tensor,
    slot_b: Tensor,
    ring_k_blgwk: Tensor | None = None,
    ring_v_blgwk: Tensor | None = None,
    ring_slot_b: Tensor | None = None,
) -> None:
    """Write keys and values of one slot per sequence, later loops' into their rings if given.

    This is the plain PyTorch version; kernels/rows.py does the same in one Triton kernel.

    Args:
        k_bLgk: keys; row 0 is loop 1.
        v_bLgk: values.
        to_k_bgnk: where row 0 goes: a cache; written at ``slot_b``.
        to_v_bgnk: likewise.
        slot_b: slots.
        ring_k_blgwk: where rows 1.. go; written at ``ring_slot_b``.
        ring_v_blgwk: likewise.
        ring_slot_b: places in the rings.
    """
    sequence_b = torch.arange(slot_b.size(0), device=slot_b.device)
    to_k_bgnk[sequence_b, :, slot_b] = k_bLgk[:, 0]
    to_v_bgnk[sequence_b, :, slot_b] = v_bLgk[:, 0]
    if ring_k_blgwk is not None and ring_v_blgwk is not None:
        ring_k_blgwk[sequence_b, :, :, ring_slot_b] = k_bLgk[:, 1:]
        ring_v_blgwk[sequence_b, :, :, ring_slot_b] = v_bLgk[:, 1:]
