"""What Megatron builds for an optimizer fits our gradient buffers."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.optimizer.optimizer import FP32Optimizer

from pltmoe.engines import megatron_optimizer
from tests.distributed.tiny import tiny_config


def test_an_optimizer_that_is_not_cut_over_ranks_is_refused(monkeypatch: pytest.MonkeyPatch):
    """With Megatron's Lion two data-parallel ranks drifted apart, and the loss looked plausible."""
    whole = FP32Optimizer.__new__(FP32Optimizer)
    built = SimpleNamespace(chained_optimizers=[whole])
    monkeypatch.setattr(megatron_optimizer, "get_megatron_optimizer", lambda *_, **__: built)
    nothing: Any = None
    with pytest.raises(AssertionError, match="FP32Optimizer is not cut over ranks"):
        megatron_optimizer.build_optimizer(tiny_config(), nothing, torch.float32, nothing)
