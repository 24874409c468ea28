"""What a skipped step says on thousands of ranks; no step on a part of its data or checkpoint."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from pltmoe.engines.stepping import SteppingEngine, _not_finite_loss
from pltmoe.errors import DataError, EngineError


class Engine(SteppingEngine):
    _layout = SimpleNamespace(micro_batches=4)

    def _run(self, batches, forward_only):
        return torch.tensor([0.0, len(batches)])


def test_a_step_whose_data_end_is_refused():
    batches = iter([{}] * 6)
    assert Engine()._forward_backward(batches, False)[1] == 4
    with pytest.raises(DataError, match="data end inside a step: 2 of its 4 micro batches"):
        Engine()._forward_backward(batches, False)


def test_a_part_of_a_checkpoint_that_restore_forgets_is_refused(monkeypatch):
    """Such as a moving average that ``state`` and ``placeholders`` know: it would begin anew."""
    for name in ("_load_model", "_start_optimizer"):
        monkeypatch.setattr(Engine, name, lambda *_: None)
    with pytest.raises(EngineError, match="leaves ema of the checkpoint, which would begin anew"):
        Engine().restore({"model": {}, "ema": {}}, 3)


def test_a_loss_that_is_broken_everywhere_does_not_list_thousands_of_ranks(monkeypatch):
    monkeypatch.setattr(dist, "get_world_size", lambda: 4096)
    monkeypatch.setattr(
        dist,
        "all_gather_object",
        lambda per_rank, mine: per_rank.__setitem__(slice(None), [mine] * 4096),
    )
    told = _not_finite_loss(torch.tensor([float("nan"), 3.0]))
    assert told.startswith("the loss is not finite (rank 0: nan, rank 1: nan, ")
    assert told.endswith("rank 7: nan and 4088 more ranks)")
