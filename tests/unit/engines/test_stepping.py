"""What a skipped step says on thousands of ranks."""

import torch
import torch.distributed as dist

from pltmoe.engines.stepping import _not_finite_loss


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
