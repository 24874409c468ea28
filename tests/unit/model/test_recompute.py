"""Attention that is repeated for its gradients computes in the precision of its first pass."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from pltmoe.model import block, gated_attention
from pltmoe.model import plt as plt_module
from pltmoe.model.gated_attention import GatedSelfAttention
from pltmoe.model.loop_stats import collect_loop_stats
from pltmoe.model.recompute import is_recomputing
from tests.single_process import build_model, packed_batch
from tests.unit.model.cases import ROWS, small_model


@pytest.mark.parametrize("granularity", ["selective", "full"])
def test_what_is_repeated_enters_the_precision_again(
    granularity: str, groups: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Backward is outside of the forward pass, and so of the FP8 that it has entered, once."""
    depth, seen, mixed = 0, [], GatedSelfAttention._mixed

    @contextmanager
    def precision(config: Any) -> Iterator[None]:
        nonlocal depth
        depth += 1
        try:
            yield
        finally:  # a repetition ends with an exception when it has what it needs
            depth -= 1

    def recorded(self: GatedSelfAttention, *arguments: Any) -> torch.Tensor:
        seen.append((is_recomputing(), depth))
        return mixed(self, *arguments)

    for module in (block, gated_attention, plt_module):
        monkeypatch.setattr(module, "get_fp8_context", precision)
    monkeypatch.setattr(GatedSelfAttention, "_mixed", recorded)
    model = small_model(**ROWS["row5_plt2"])
    plt = build_model(model, groups, torch.float32)
    plt.config.recompute_granularity = granularity
    tokens, labels, positions = packed_batch(model)
    plt(tokens, positions, labels).mean().backward()
    passes = model.num_layers * model.num_loops
    assert seen == [(False, 1)] * passes + [(True, 1)] * passes and depth == 0


@pytest.mark.parametrize("granularity", ["selective", "full"])
def test_what_is_repeated_counts_once(granularity: str, groups: Any) -> None:
    """Statistics and the counts that move the expert bias."""
    model, found = small_model(**ROWS["row5_plt2"], moe_expert_bias_update_rate=1e-3), []
    for recompute in (None, granularity):
        plt = build_model(model, groups, torch.float64)
        plt.config.recompute_granularity = recompute
        tokens, labels, positions = packed_batch(model)
        plt(tokens, positions, labels).mean().backward()
        counts = torch.stack([x.mlp.router.local_tokens_per_expert for x in plt.layers])
        found.append({"counts": counts, **collect_loop_stats(plt.layers)})
    torch.testing.assert_close(*found)
