"""The Megatron model on a GPU against the float64 reference on the same GPU."""

from typing import Any

import pytest
import torch

from pltmoe.model.grouped_experts import GroupedExperts
from tests.single_process import build_model
from tests.unit.model.cases import ALL, ROWS, small_model
from tests.unit.model.parity import (
    ROUNDED,
    assert_equals_reference,
    assert_rounds_like_bfloat16,
)


@pytest.mark.parametrize("name", ALL)
def test_float64_equals_reference(name: str, groups: Any) -> None:
    model = small_model(**ALL[name])
    plt = build_model(model, groups, torch.float64)
    assert_equals_reference(plt, model, tolerance=1e-9, loss_tolerance=1e-6)


@pytest.mark.parametrize("transformer_impl", ["local", "transformer_engine"])
@pytest.mark.parametrize("name", ROWS)
def test_bfloat16_rounds_the_reference(name: str, transformer_impl: str, groups: Any) -> None:
    if transformer_impl == "transformer_engine":
        pytest.importorskip("transformer_engine.pytorch", reason="needs Transformer Engine")
    model = small_model(**ROWS[name], **ROUNDED)
    plt = build_model(model, groups, torch.bfloat16, transformer_impl)
    assert_rounds_like_bfloat16(plt, model)


def test_the_fused_router_chooses_as_the_others_do(groups: Any) -> None:
    """Weights, choice and gradients of Transformer Engine's kernel; 64 experts, 8 chosen."""
    pytest.importorskip("transformer_engine.pytorch", reason="needs Transformer Engine")
    model = small_model(**ROWS["row1_vanilla"] | {"num_experts": 64, "moe_top_k": 8})
    router = build_model(model, groups, torch.bfloat16, "transformer_engine").layers[0].mlp.router
    logits, found = torch.randn(500, 64, device="cuda"), []
    assert router.config.moe_router_fusion
    for fused in (True, False):
        router.config.moe_router_fusion = fused
        x = logits.clone().requires_grad_()
        probs, chosen = router._choose(x, x.softmax(-1))
        found.append((probs, chosen, *torch.autograd.grad(probs.square().sum(), x)))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_grouped_experts_equal_experts_one_by_one(groups: Any) -> None:
    """Rows of every expert, of one only, and fewer than experts; bf16 products of other shapes."""
    model = small_model(**ROWS["row1_vanilla"], hidden_size=64, moe_ffn_hidden_size=32)
    experts = build_model(model, groups, torch.bfloat16).layers[0].mlp.experts
    assert isinstance(experts, GroupedExperts)
    for counts in ([5, 1, 40, 0, 18, 3], [0, 0, 67, 0, 0, 0], [1, 0, 0, 1, 0, 0]):
        tokens, found = torch.tensor(counts), []
        for forward in (experts.forward, super(GroupedExperts, experts).forward):
            torch.manual_seed(1)
            x = torch.randn(sum(counts), 64, device="cuda", dtype=torch.bfloat16).requires_grad_()
            share = torch.rand(sum(counts), device="cuda", requires_grad=True)
            y, _ = forward(x, tokens, share)
            inputs = [x, share, *experts.parameters()]
            found.append([y, *torch.autograd.grad(y.float().square().sum(), inputs)])
        for got, expected in zip(*found, strict=True):
            assert (got - expected).abs().max() <= 0.02 * expected.abs().max()


def test_products_that_repeat_can_be_asked_for_after_others() -> None:
    """See conftest.py; a run asks before its first product (runtime/seeds.py)."""
    x = torch.randn(8, 8, device="cuda")
    product = x @ x
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.equal(x @ x, product)
    finally:
        torch.use_deterministic_algorithms(False)
