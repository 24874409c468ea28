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

from pltmoe.config import ModelConfig
from pltmoe.hf.mapping import megatron_to_hf
from pltmoe.model.reference import ReferencePLT, language_model_loss, router_loss
from tests.unit.model.cases import ALL, small_model

TOLERANCE = 1e-9
FLOAT32_LOSS_TOLERANCE = 1e-6


def reference_with_weights_of(plt: Any, model: ModelConfig) -> ReferencePLT:
    state = {k: v for k, v in plt.state_dict().items() if isinstance(v, Tensor)}
    reference = ReferencePLT(model).double()
    reference.load_state_dict(megatron_to_hf(state, model), strict=not model.tied_embeddings)
    return reference


def batch(model: ModelConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens and labels [2, 19]; positions restart at slots 7 and 12 of the second sequence."""
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, model.vocab_size, (2, 20), generator=generator)
    positions = torch.arange(19).repeat(2, 1)
    positions[1, 7:12] = torch.arange(5)
    positions[1, 12:] = torch.arange(7)
    return tokens[:, :-1], tokens[:, 1:], positions


@pytest.mark.parametrize("name", ALL)
def test_equals_reference(name: str, build: Callable[..., Any]) -> None:
    model = small_model(**ALL[name])
    plt, (tokens, labels, positions) = build(model), batch(model)
    reference = reference_with_weights_of(plt, model)

    expected = reference(tokens, positions == 0)
    expected_loss = language_model_loss(expected.logits, labels) + router_loss(expected, model)
    expected_loss.backward()
    logits = plt(tokens, positions)
    assert (logits - expected.logits).abs().max() < TOLERANCE
    # calculate_per_token_loss: Megatron's router losses assume a *summed* token loss.
    (language_model_loss(logits, labels) * tokens.numel()).backward()

    gradients = {
        n: p.grad / tokens.numel() for n, p in plt.named_parameters() if p.grad is not None
    }
    mapped = megatron_to_hf(gradients, model, partial=True)
    compared = 0
    for parameter_name, parameter in reference.named_parameters():
        got = mapped.get(parameter_name)
        if parameter.grad is None or not parameter.grad.any():
            assert got is None or not got.any(), parameter_name
            continue
        assert got is not None, f"no gradient for {parameter_name}"
        error = (got - parameter.grad).abs().max() / parameter.grad.abs().max()
        assert error < TOLERANCE, (parameter_name, error)
        compared += 1
    assert compared > 10

    megatron_loss = plt(tokens, positions, labels).mean().double()
    assert (
        abs(megatron_loss - language_model_loss(expected.logits, labels)) < FLOAT32_LOSS_TOLERANCE
    )


@pytest.mark.parametrize("name", ["row5_plt2", "dense_row6_plt3"])
def test_megatron_window_is_cut_into_blocks(name: str, build: Callable[..., Any]) -> None:
    """A sequence of several blocks (sdpa.py cuts at 64 slots) equals the full-mask reference."""
    model = small_model(**ALL[name], num_layers=1)
    plt = build(model)
    reference = reference_with_weights_of(plt, model)
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


def test_float32_matches_reference_within_rounding(build: Callable[..., Any]) -> None:
    """The dtype that a CPU trains in: float32 rounding, amplified by two loops of two layers."""
    model = small_model(**ALL["row5_plt2"])
    plt, (tokens, _, _) = build(model, torch.float32), batch(model)
    state = {k: v.double() for k, v in plt.state_dict().items() if isinstance(v, Tensor)}
    reference = ReferencePLT(model).double()
    reference.load_state_dict(megatron_to_hf(state, model))
    expected = reference(tokens).logits
    assert (plt(tokens) - expected).abs().max() < 1e-5 * expected.abs().max()
