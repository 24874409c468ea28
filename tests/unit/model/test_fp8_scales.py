"""Scales of earlier passes, in modules that hold them as Transformer Engine's do.

With the library: tests/gpu/test_fp8.py and test_fp8_runs.py.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pltmoe.model.fp8_scales import (
    forget_what_was_not_trained,
    fp8_scales,
    restore_fp8_scales,
)
from tests.single_process import build_model
from tests.unit.model.cases import ROWS, small_model

PRODUCTS = {"layers.0.self_attention.linear_qkv": 1, "layers.1.self_attention.linear_qkv": 4}


def tensors(number: float, products: int, kinds: int) -> SimpleNamespace:
    history = torch.full((3, kinds * products), number)
    return SimpleNamespace(scale=torch.full((kinds * products,), number), amax_history=history)


def with_modules(groups: Any, number: float | None) -> Any:
    """A model with two modules as Transformer Engine's: with scales of ``number``, or not run."""
    plt = build_model(small_model(**ROWS["row1_vanilla"]), groups, torch.float32)
    for name, products in PRODUCTS.items():
        module, meta = plt.get_submodule(name), {}

        def start(recipe: str, meta: dict[str, Any] = meta) -> None:
            assert recipe == "the recipe"
            meta["scaling_fwd"] = tensors(1.0, meta["num_gemms"], 3)
            meta["scaling_bwd"] = tensors(1.0, meta["num_gemms"], 2)

        module.fp8_meta, module.init_fp8_meta_tensors = meta, start
        if number is not None:
            meta["num_gemms"] = products
            meta["scaling_fwd"] = tensors(number, products, 3)
            meta["scaling_bwd"] = tensors(number + 1, products, 2)
    return plt


@pytest.fixture
def _recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron.core.fp8_utils.get_fp8_recipe", lambda config: "the recipe")


@pytest.mark.usefixtures("_recipe")
def test_scales_come_back(groups: Any) -> None:
    saved = fp8_scales(with_modules(groups, 5.0))
    assert {name: part["products"] for name, part in saved.items()} == PRODUCTS
    plt = with_modules(groups, None)
    assert fp8_scales(plt) == {}
    restore_fp8_scales(plt, saved)
    for name, part in fp8_scales(plt).items():
        for what, values in part.items():
            assert torch.as_tensor(values == saved[name][what]).all(), (name, what)
    meta = plt.get_submodule("layers.1.self_attention.linear_qkv").fp8_meta
    assert meta["scaling_fwd"].scale.tolist() == [5.0] * 12
    assert meta["scaling_bwd"].amax_history.tolist() == [[6.0] * 8] * 3


def test_validation_and_skipped_steps_are_forgotten(groups: Any) -> None:
    plt, name = with_modules(groups, 5.0), "layers.0.self_attention.linear_qkv"
    history = plt.get_submodule(name).fp8_meta["scaling_bwd"].amax_history
    history[1, 0], history[2, 1] = torch.inf, torch.nan  # of a step that was skipped
    forget_what_was_not_trained(plt)
    assert history.tolist() == [[0.0, 0.0], [0.0, 6.0], [6.0, 0.0]]
