"""Experts in one grouped product compute what they compute one by one, gradients included."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pltmoe.engines.backends import backends
from pltmoe.model import layer_specs
from pltmoe.model.grouped_experts import GroupedExperts, GroupedLinear
from pltmoe.model.grouped_product import fits_grouped_product
from pltmoe.model.megatron_config import transformer_config
from pltmoe.runtime.devices import Backend
from tests.single_process import build_model, packed_batch
from tests.unit.model.cases import ROWS, VARIANTS, small_model

MODELS = {**ROWS, "shared_routing_plt3": VARIANTS["shared_routing_plt3"]}


def loss_and_gradients(plt: Any, model: Any) -> dict[str, torch.Tensor]:
    tokens, labels, positions = packed_batch(model)
    loss = plt(tokens, positions, labels).mean()
    loss.backward()
    gradients = {name: p.grad for name, p in plt.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **gradients}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_with_grouped_experts_equals_one_without(
    name: str, groups: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """float32, the widest that PyTorch's grouped product takes: sums of other shapes round."""
    model = small_model(**MODELS[name])
    expected = loss_and_gradients(build_model(model, groups, torch.float32), model)
    monkeypatch.setattr(layer_specs, "why_one_by_one", lambda config: None)
    plt = build_model(model, groups, torch.float32)
    assert all(isinstance(layer.mlp.experts, GroupedExperts) for layer in plt.layers)
    found = loss_and_gradients(plt, model)
    assert found.keys() == expected.keys()
    assert any("local_experts" in key for key in found)
    for key, value in expected.items():
        assert (found[key] - value).abs().max() <= 2e-6 * max(value.abs().max(), 1e-3), key


def test_no_copy_of_the_experts_is_kept_for_the_backward_pass() -> None:
    """Neither by the product nor for experts without rows, whose gradient is zero."""
    torch.manual_seed(0)
    x = torch.randn(10, 16, requires_grad=True)
    weights = [torch.randn(8, 16, requires_grad=True) for _ in range(4)]
    ends = torch.tensor([3, 3, 8, 10], dtype=torch.int32)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = GroupedLinear.apply(x, ends, *weights)
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in (x, ends, *weights)}
    expected = torch.cat([part @ w.t() for part, w in zip(x.split([3, 0, 5, 2]), weights)])  # noqa: B905
    dy = torch.randn_like(y)
    assert (y - expected).abs().max() < 1e-5
    for got, wanted in zip(
        torch.autograd.grad(y, [x, *weights], dy),
        torch.autograd.grad(expected, [x, *weights], dy),
        strict=True,
    ):
        assert (got - wanted).abs().max() < 1e-5


def test_a_rank_without_any_row_gives_its_experts_zero_gradients(
    groups: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_specs, "why_one_by_one", lambda config: None)
    model = small_model(**ROWS["row1_vanilla"])
    experts = build_model(model, groups, torch.float32).layers[0].mlp.experts
    rows = torch.zeros(0, model.hidden_size, requires_grad=True)
    y, _ = experts(rows, torch.zeros(model.num_experts, dtype=torch.int64), torch.zeros(0))
    y.sum().backward()
    assert y.shape == rows.shape
    assert all(p.grad is not None and not p.grad.any() for p in experts.parameters())


def test_where_experts_run_one_by_one_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model(**ROWS["row5_plt2"])
    config = transformer_config(model, params_dtype=torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "a loop on a CPU" in str(layer_specs.why_one_by_one(config))
    said = backends(SimpleNamespace(model=model), config, Backend("torch", "asked for"))["experts"]
    assert "one matrix product pair per expert: torch's grouped product" in str(said)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert layer_specs.why_one_by_one(config) is None
    wide = transformer_config(model, params_dtype=torch.float32)
    assert "is for bf16" in str(layer_specs.why_one_by_one(wide))
    odd = model.model_copy(update={"moe_ffn_hidden_size": 36})
    narrow = transformer_config(odd, params_dtype=torch.bfloat16)
    assert "expert width 36 is no multiple of 8" in str(layer_specs.why_one_by_one(narrow))
    assert fits_grouped_product([8, 16], torch.bfloat16)
    assert not fits_grouped_product([12], torch.bfloat16)
