"""The shift and the window, pinned slot by slot: both models import these functions."""

import pytest
import torch

from pltmoe.model.cross_loop import next_loop_input, shift, window_mask


def test_shift_moves_one_slot_right_and_starts_with_zero() -> None:
    h = torch.arange(1.0, 5.0).view(1, 4, 1)
    moved = shift(h, torch.zeros(1, 4, dtype=torch.bool), slot_dim=1)
    assert moved.flatten().tolist() == [0.0, 1.0, 2.0, 3.0]


def test_shift_gives_zero_at_each_document_start() -> None:
    h = torch.arange(1.0, 7.0).view(1, 6, 1)
    starts = torch.tensor([[True, False, False, True, False, True]])
    assert shift(h, starts, 1).flatten().tolist() == [0.0, 1.0, 2.0, 0.0, 4.0, 0.0]


def test_shift_along_either_layout_is_the_same() -> None:
    h = torch.randn(2, 5, 3)
    starts = torch.rand(2, 5) < 0.3
    by_sequence = shift(h, starts, slot_dim=1)
    by_slot = shift(h.transpose(0, 1), starts.transpose(0, 1), slot_dim=0)
    assert torch.equal(by_slot.transpose(0, 1), by_sequence)


def test_next_loop_input_scales_both_terms() -> None:
    e, h = torch.tensor([[[10.0], [20.0]]]), torch.tensor([[[3.0], [4.0]]])
    none = torch.zeros(1, 2, dtype=torch.bool)
    assert next_loop_input(e, h, none, 1, 0.5, 2.0).flatten().tolist() == [5.0, 16.0]
    assert next_loop_input(e, h, none, 1).flatten().tolist() == [10.0, 23.0]


@pytest.mark.parametrize("window", [1, 2, 63, 64, 65, 200])
def test_window_counts_the_current_token(window: int) -> None:
    """64 keys including the current token: flash attention's window (63, 0)."""
    slots = 130
    mask = window_mask(slots, window)
    for query in range(slots):
        seen = [key for key in range(slots) if mask[query, key]]
        assert seen == list(range(max(0, query - window + 1), query + 1))
