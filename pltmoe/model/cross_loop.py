"""What happens between loops: the one-slot shift of cross-loop parallelism. Pure functions.

Letters: s slots, b sequences, d hidden size; a suffix names the order, e.g. ``h_sbd``.
"""

import torch
from torch import Tensor


def shift(h: Tensor, starts_document: Tensor, slot_dim: int) -> Tensor:
    """Move every vector one slot to the right; the first slot of a document gets zeros.

    This is what lets slot i run loop l while slot i+1 runs loop l-1 (paper, section 3.1).

    Args:
        h: hidden states with slots along ``slot_dim`` (0 for ``sbd``, 1 for ``bsd``).
        starts_document: bool, ``h.shape[:2]``; true where a document begins. Slot 0 is always
            treated as a beginning.
        slot_dim: 0 or 1.
    """
    return shift_slots(h, slot_dim).masked_fill(starts_document.unsqueeze(-1), 0.0)


def shift_slots(h: Tensor, slot_dim: int) -> Tensor:
    """Move every vector one slot to the right, whatever the documents; slot 0 gets zeros."""
    first = h.narrow(slot_dim, 0, 1)
    return torch.cat(
        [torch.zeros_like(first), h.narrow(slot_dim, 0, h.size(slot_dim) - 1)], slot_dim
    )


def next_loop_input(
    embedding: Tensor,
    previous: Tensor,
    starts_document: Tensor,
    slot_dim: int,
    emb_scale: float = 1.0,
    hidden_scale: float = 1.0,
) -> Tensor:
    """Return B = emb_scale * E + hidden_scale * shift(H_{l-1}), the input of loop l > 1.

    The paper sums plainly (both scales 1). ``previous`` is already normed when the model
    normalises between loops.
    """
    moved = shift(previous, starts_document, slot_dim)
    return add_to_embedding(embedding, moved, emb_scale, hidden_scale)


def add_to_embedding(
    embedding: Tensor, moved: Tensor, emb_scale: float, hidden_scale: float
) -> Tensor:
    """Return emb_scale * E + hidden_scale * shift(H_{l-1}); a plain sum where both scales are 1."""
    if emb_scale == hidden_scale == 1.0:
        return embedding + moved
    return emb_scale * embedding + hidden_scale * moved


def window_mask(num_slots: int, window_keys: int, device: torch.device | None = None) -> Tensor:
    """Return the sliding-window mask [query, key], true where a query sees a key.

    A query sees ``window_keys`` keys including itself: flash attention's window (w-1, 0).
    """
    slot = torch.arange(num_slots, device=device)
    distance = slot[:, None] - slot[None, :]
    return (distance >= 0) & (distance < window_keys)
