"""What PyTorch's grouped matrix product takes."""

from collections.abc import Iterable

import torch

ROW_BYTES = 16
"""Rows of its matrices are multiples of this."""


def fits_grouped_product(sizes: Iterable[int], dtype: torch.dtype) -> bool:
    """Whether ``grouped_mm`` takes matrices whose rows have these sizes."""
    return all(size * dtype.itemsize % ROW_BYTES == 0 for size in sizes)
