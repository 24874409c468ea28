"""Builds Megatron models inside the test process."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from tests.single_process import build_model


@pytest.fixture
def build(groups: Any) -> Callable[..., Any]:
    """``build(model_config)`` returns an initialised float64 PLTModel."""
    return partial(build_model, groups=groups, dtype=torch.float64)
