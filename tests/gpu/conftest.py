"""Everything here needs an NVIDIA GPU; without one it is skipped and says so."""

from typing import Any

import pytest
import torch

from tests.single_process import create_single_process_groups


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of this folder, and skip them where there is no GPU."""
    no_gpu = pytest.mark.skip(reason="needs an NVIDIA GPU: torch.cuda.is_available() is false")
    for item in items:
        if "gpu" in item.path.parts:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(no_gpu)


@pytest.fixture(scope="session")
def groups(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Megatron's process groups for a single process, over NCCL."""
    return create_single_process_groups(tmp_path_factory.mktemp("store"))
