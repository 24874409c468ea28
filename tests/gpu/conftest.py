"""Everything here needs an NVIDIA GPU; without one it is skipped and says so."""

import os

import pytest
import torch

from pltmoe.runtime import fp8

# PyTorch looks once, at a process's first product: tests that ask for kernels that repeat come
# after others.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of this folder, and skip them where there is no GPU."""
    no_gpu = pytest.mark.skip(reason="needs an NVIDIA GPU: torch.cuda.is_available() is false")
    for item in items:
        if "gpu" in item.path.parts:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(no_gpu)


@pytest.fixture(params=RECIPES)
def recipe(request: pytest.FixtureRequest) -> str:
    """Each recipe of FP8 that this GPU has."""
    pytest.importorskip("transformer_engine.pytorch", reason="needs Transformer Engine")
    machine = fp8.this_machine()
    assert machine is not None
    if reason := fp8.why_recipe_cannot_run(request.param, machine):
        pytest.skip(reason)
    return request.param
