"""Compares a Megatron model with the reference: logits, loss and every gradient."""

from typing import Any

import torch
from torch import Tensor

from pltmoe.config import ModelConfig
from pltmoe.model.initialize import global_name
from pltmoe.model.reference import language_model_loss, router_loss
from tests.single_process import packed_batch, reference_of
from tests.state_dicts import megatron_to_hf


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

    named = [(global_name(plt, n), p.grad) for n, p in plt.named_parameters()]
    gradients = {n: g.double() / tokens.numel() for n, g in named if g is not None}
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


ROUNDED = {"hidden_size": 64, "head_dim": 16, "moe_ffn_hidden_size": 32}
"""Sizes that fused kernels take."""


def assert_rounds_like_bfloat16(plt: Any, model: ModelConfig) -> None:
    """Raise unless loss, logits and gradients are the reference's up to bfloat16's 8 bits.

    That is 4e-3 per operation, a few dozen operations deep, and a token whose experts nearly tie
    may go to others; so bounds are on means. They are twice what a CPU measures at ROUNDED sizes
    (loss 0.3 %, logits 2.4 %, gradients 11 %). A wrong mask or a swapped gate changes logits by
    more than half of their size.
    """
    tokens, labels, positions = packed_batch(model)
    reference = reference_of(plt, model)
    expected = reference(tokens, positions == 0).logits
    expected_loss = language_model_loss(expected, labels)
    expected_loss.backward()
    logits = plt(tokens, positions).double()
    loss = plt(tokens, positions, labels).double().mean()
    loss.backward()
    assert abs(loss - expected_loss) < 0.006 * expected_loss
    assert (logits - expected).abs().mean() < 0.05 * expected.abs().mean()
    named = {global_name(plt, n): p.grad for n, p in plt.named_parameters() if p.grad is not None}
    found = megatron_to_hf({n: g.double() for n, g in named.items()}, model, partial=True)
    wanted = {n: p.grad for n, p in reference.named_parameters() if n in found}
    both: list[Tensor] = [torch.cat([x[n].flatten() for n in found]) for x in (found, wanted)]
    assert (both[0] - both[1]).norm() < 0.22 * both[1].norm()
