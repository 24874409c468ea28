"""Loop diagnostics are the numbers that follow from the reference's hidden states."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from pltmoe.model.loop_diagnostics import diagnostic_metrics
from tests.single_process import packed_batch, reference_of
from tests.unit.model.cases import ALL, small_model


def cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a * b).sum(-1) / (a.square().sum(-1) * b.square().sum(-1)).sqrt()


def expected_of(plt: Any, model: Any) -> dict[str, float]:
    """The same numbers, straight from the definitions."""
    tokens, _, positions = packed_batch(model)
    reference = reference_of(plt, model)
    h = reference(tokens, positions == 0).loop_hidden
    found = {}
    updates = [None, *(b - a for a, b in zip(h, h[1:], strict=False))]
    for l in range(1, len(h)):  # noqa: E741
        size = updates[l].norm(dim=-1) / h[l - 1].norm(dim=-1)
        found[f"plt/update_size/loop_{l + 1}"] = size.mean()
        # Nothing is shifted into the first slot, so a loop may leave it exactly where it was.
        moves = size > 1e-9
        assert moves[:, 1:].all()
        found[f"plt/update_cosine/loop_{l + 1}"] = cosine(updates[l], h[l - 1])[moves].mean()
        if l > 1:
            found[f"plt/update_turn/loop_{l + 1}"] = cosine(updates[l], updates[l - 1])[
                moves
            ].mean()
        if model.cross_loop_shift:
            given = reference.model.norm(h[l - 1]) if model.normalize_per_loop else h[l - 1]
            own, before = given[:, 1:], given[:, :-1]
            inside = positions[:, 1:] > 0
            distance = (own - before).norm(dim=-1) / own.norm(dim=-1)
            found[f"plt/slot_distance/loop_{l}"] = distance[inside].mean()
            found[f"plt/slot_cosine/loop_{l}"] = cosine(own, before)[inside].mean()
    return {name: value.item() for name, value in found.items()}


@pytest.mark.parametrize("name", ["row1_vanilla", "loop3", "dense_row5_plt2", "norm_and_scales"])
def test_equals_the_definitions(name: str, build: Callable[..., Any]) -> None:
    model = small_model(**ALL[name])
    plt = build(model)
    tokens, _, positions = packed_batch(model)
    plt.diagnostics.begin_step(watch=True)
    plt(tokens, positions)
    got = diagnostic_metrics(plt.diagnostics.collect())
    expected = expected_of(plt, model)
    assert got == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert (len(expected) == 0) == (model.num_loops == 1)
    with torch.no_grad():  # validation leaves them alone
        plt(tokens, positions)
    assert diagnostic_metrics(plt.diagnostics.collect()) == got


def test_a_step_that_is_not_logged_takes_nothing(build: Callable[..., Any]) -> None:
    """Neither time nor memory: nothing is kept between the loops, and old sums are gone."""
    model = small_model(**ALL["row6_plt3"])
    plt = build(model)
    tokens, _, positions = packed_batch(model)
    plt.diagnostics.begin_step(watch=True)
    plt(tokens, positions)
    plt.diagnostics.begin_step(watch=False)
    plt(tokens, positions)
    assert not any(tensor.any() for tensor in plt.diagnostics.collect().values())
    assert not plt.diagnostics._before


def test_micro_batches_of_a_pipeline_may_come_in_between(build: Callable[..., Any]) -> None:
    """H_1 of the second micro batch comes before H_2 of the first; sums are over tokens."""
    diagnostics = build(small_model(**ALL["row5_plt2"])).diagnostics
    h = torch.randn(2, 2, 5, 3, 24, dtype=torch.float64)  # micro batch, loop, s, b, d
    diagnostics.begin_step(watch=True)
    for loop in (1, 2):
        for micro_batch in (0, 1):
            diagnostics.add_output(loop, h[micro_batch, loop - 1], micro_batch)
    update = h[:, 1] - h[:, 0]
    sizes = update.norm(dim=-1) / h[:, 0].norm(dim=-1)
    got = diagnostic_metrics(diagnostics.collect())
    assert got["plt/update_size/loop_2"] == pytest.approx(sizes.mean().item(), rel=1e-5)
    assert not diagnostics._before
