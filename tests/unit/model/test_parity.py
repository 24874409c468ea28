"""The Megatron model equals the reference: logits, loss and every gradient, in float64.

One part of Megatron-core stays in float32 whatever the model's dtype: its cross entropy
(``VocabParallelCrossEntropy`` calls ``.float()``). Gradients are therefore compared through a
float64 cross entropy on the logits, to 1e-9, and Megatron's own loss to 1e-6. RoPE angles are
float32 in both models (and in transformers), computed by the same formula.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.single_process import build_model, packed_batch, reference_of
from tests.unit.model.cases import ALL, ROWS, small_model
from tests.unit.model.parity import (
    ROUNDED,
    assert_equals_reference,
    assert_rounds_like_bfloat16,
)

TOLERANCE = 1e-9
FLOAT32_LOSS_TOLERANCE = 1e-6


@pytest.mark.parametrize("name", ALL)
def test_equals_reference(name: str, build: Callable[..., Any]) -> None:
    model = small_model(**ALL[name])
    assert_equals_reference(build(model), model, TOLERANCE, FLOAT32_LOSS_TOLERANCE)


@pytest.mark.parametrize("name", ["row5_plt2", "dense_row6_plt3"])
def test_megatron_window_is_cut_into_blocks(name: str, build: Callable[..., Any]) -> None:
    """A sequence of several blocks (sdpa.py cuts at 64 slots) equals the full-mask reference."""
    model = small_model(**ALL[name], num_layers=1)
    plt = build(model)
    reference = reference_of(plt, model)
    tokens = torch.randint(
        0, model.vocab_size, (1, 150), generator=torch.Generator().manual_seed(1)
    )
    assert (plt(tokens) - reference(tokens).logits).abs().max() < TOLERANCE


@pytest.mark.parametrize("name", ["row2_loop2", "row3_clp", "row5_plt2", "row6_plt3"])
def test_no_logit_depends_on_a_later_token(name: str, build: Callable[..., Any]) -> None:
    """The gradient of a slot's logits is exactly zero at later tokens and non-zero at its own."""
    model = small_model(**ALL[name])
    plt = build(model)
    embedded: list[Tensor] = []
    plt.embedding.register_forward_hook(lambda *call: embedded.append(call[-1]))
    tokens = torch.randint(0, model.vocab_size, (1, 12), generator=torch.Generator().manual_seed(2))
    logits = plt(tokens)
    for slot in (0, 5, 10):
        (gradient,) = torch.autograd.grad(
            logits[0, slot].square().sum(), embedded, retain_graph=True
        )
        assert not gradient[slot + 1 :].any()
        assert gradient[slot].any()


def test_float32_matches_reference_within_rounding(groups: Any) -> None:
    """The dtype that a CPU trains in: float32 rounding, amplified by two loops of two layers."""
    model = small_model(**ALL["row5_plt2"])
    plt = build_model(model, groups, torch.float32)
    tokens, _, _ = packed_batch(model)
    expected = reference_of(plt, model)(tokens).logits
    assert (plt(tokens) - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", ROWS)
def test_bfloat16_rounds_the_reference(name: str, groups: Any) -> None:
    model = small_model(**ROWS[name], **ROUNDED)
    assert_rounds_like_bfloat16(build_model(model, groups, torch.bfloat16), model)
