"""Everything here needs an NVIDIA GPU; without one it is skipped and says so."""

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of this folder, and skip them where there is no GPU."""
    no_gpu = pytest.mark.skip(reason="needs an NVIDIA GPU: torch.cuda.is_available() is false")
    for item in items:
        if "gpu" in item.path.parts:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(no_gpu)
