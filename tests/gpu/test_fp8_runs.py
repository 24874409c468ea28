"""Runs in FP8 on this GPU: stopped, validated and resumed, they are the run that went through."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.deepspeed_cases import curve

RUN: dict[str, Any] = {
    "model__hidden_size": 64, "model__head_dim": 16, "model__moe_ffn_hidden_size": 32,
    "train__precision": "fp8", "train__deterministic": True,
}  # fmt: skip


@pytest.fixture
def _deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As runtime/seeds.py sets it, and only here; cuBLAS: conftest.py."""
    monkeypatch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_deterministic")
def test_a_run_goes_on_as_if_it_had_not_stopped(recipe: str, tmp_path: Path) -> None:
    """The half that is saved validates before; the other one does not."""
    run = {**RUN, "train__fp8_recipe": recipe}
    straight = curve(None, 5, **run)
    curve(None, 3, save_to=tmp_path, **run)
    parts = ("optimizer", "random", "guard", *(["fp8_scales"] if recipe == "delayed" else []))
    resumed = curve(None, 2, load_from=tmp_path, parts=parts, **run)
    assert resumed["losses"] == straight["losses"][3:]
    assert resumed["norms"] == straight["norms"][3:]
