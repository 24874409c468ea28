"""Compares a Megatron model with the reference: logits, loss and every gradient."""

from typing import Any

from pltmoe.config import ModelConfig
from pltmoe.hf.mapping import megatron_to_hf
from pltmoe.model.reference import language_model_loss, router_loss
from tests.single_process import packed_batch, reference_of


def assert_equals_reference(
    plt: Any, model: ModelConfig, tolerance: float, loss_tolerance: float
) -> None:
    """Raise unless logits and gradients agree to ``tolerance``, relative to the largest entry."""
    tokens, labels, positions = packed_batch(model)
    reference = reference_of(plt, model)
    expected = reference(tokens, positions == 0)
    expected_loss = language_model_loss(expected.logits, labels)
    (expected_loss + router_loss(expected, model)).backward()

    logits = plt(tokens, positions)
    scale = max(1.0, expected.logits.abs().max().item())
    assert (logits - expected.logits).abs().max() < tolerance * scale
    # calculate_per_token_loss: Megatron's router losses assume a *summed* token loss.
    (language_model_loss(logits, labels) * tokens.numel()).backward()

    named = plt.named_parameters()
    gradients = {n: p.grad.double() / tokens.numel() for n, p in named if p.grad is not None}
    mapped = megatron_to_hf(gradients, model, partial=True)
    compared = 0
    for name, parameter in reference.named_parameters():
        got = mapped.get(name)
        if parameter.grad is None or not parameter.grad.any():
            assert got is None or not got.any(), name
            continue
        assert got is not None, f"no gradient for {name}"
        error = (got - parameter.grad).abs().max() / parameter.grad.abs().max()
        assert error < tolerance, (name, error.item())
        compared += 1
    assert compared > 10

    own_loss = plt(tokens, positions, labels).double().mean()
    assert abs(own_loss - expected_loss) < loss_tolerance
