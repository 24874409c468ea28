"""Builds Megatron models inside the test process."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from tests.single_process import build_model, create_single_process_groups


@pytest.fixture(scope="session")
def groups(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Megatron's process groups for a single process."""
    return create_single_process_groups(tmp_path_factory.mktemp("store"))


@pytest.fixture
def build(groups: Any) -> Callable[..., Any]:
    """``build(model_config)`` returns an initialised float64 PLTModel."""
    return partial(build_model, groups=groups, dtype=torch.float64)
