"""Weights depend on the seed and the global name, and have the promised spread."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from pltmoe.model.initialize import global_name, initialize
from tests.unit.model.cases import ALL, small_model


def test_seed_decides_and_order_does_not(build: Callable[..., Any]) -> None:
    plt = build(small_model(**ALL["row5_plt2"]))
    initialize(plt, seed=1)
    first = {name: p.detach().clone() for name, p in plt.named_parameters()}
    torch.randn(1000)  # the global generator plays no part
    initialize(plt, seed=1)
    assert all(torch.equal(p, first[name]) for name, p in plt.named_parameters())
    initialize(plt, seed=2)
    changed = [name for name, p in plt.named_parameters() if not torch.equal(p, first[name])]
    assert all("norm" in n or "plt_gate" in n for n in first if n not in changed)
    different = [first[f"layers.0.mlp.experts.local_experts.{e}.linear_fc1.weight"] for e in (0, 1)]
    assert not torch.equal(*different)


def test_expert_numbers_are_global(build: Callable[..., Any]) -> None:
    plt = build(small_model(**ALL["row5_plt2"]))
    plt.layers[1].mlp.local_expert_indices = [30, 31, 32, 33, 34, 35]
    name = "layers.1.mlp.experts.local_experts.2.linear_fc1.weight"
    assert global_name(plt, name) == name.replace("experts.2", "experts.32")
    assert global_name(plt, "final_norm.weight") == "final_norm.weight"


def test_a_new_vector_does_not_begin_as_noise(build: Callable[..., Any]) -> None:
    plt = build(small_model(**ALL["row5_plt2"]))
    plt.loop_scale = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="loop_scale: .* does not say how it begins"):
        initialize(plt, seed=1)


def test_spread_and_constants(build: Callable[..., Any]) -> None:
    model = small_model(
        **ALL["row5_plt2"], hidden_size=256, moe_ffn_hidden_size=128, vocab_size=512, init_std=0.02
    )
    plt = build(model)
    initialize(plt, seed=1)
    weights = dict(plt.named_parameters())
    std = {
        "embedding.word_embeddings.weight": 0.02,
        "layers.0.mlp.experts.local_experts.0.linear_fc1.weight": 0.02,
        "layers.0.mlp.experts.local_experts.0.linear_fc2.weight": 0.02 / 2,  # sqrt(2 * 2 layers)
        "layers.1.self_attention.linear_qkv.weight": 0.02,
        "layers.1.mlp.router.weight": 0.02,
        "output_layer.weight": 0.02,
    }
    for name, expected in std.items():
        assert weights[name].std().item() == pytest.approx(expected, rel=0.06), name
    assert (weights["final_norm.weight"] == 1).all()
    assert not weights["layers.0.self_attention.plt_gate.weight"].any()
