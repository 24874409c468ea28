"""Every layout computes what one process computes: the loss and every gradient, in float64."""

from typing import Any

import pytest

from tests.distributed.tiny import MOE

pytestmark = [pytest.mark.distributed, pytest.mark.xdist_group("ranks")]
CASES = "tests.distributed.parallel_cases"
TOLERANCE = 1e-11
"""Relative to a parameter's largest gradient: float64 sums in another order."""


def case(name: str) -> dict[str, Any]:
    """Read PP2xTP2-style names: sizes, chunks (V), recompute (full, selective), overlap."""
    fields = {"PP": "pipeline", "TP": "tensor", "CP": "context", "EP": "expert",
              "ETP": "expert_tensor"}  # fmt: skip
    parallel: dict[str, Any] = {}
    for part in name.split("x"):
        kind, size = part.rstrip("0123456789"), part.lstrip("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
        if kind == "V":
            parallel["parallel__model_chunks_per_stage"] = int(size)
        elif kind in fields:
            parallel[f"parallel__{fields[kind]}_parallel_size"] = int(size)
        elif kind in ("full", "selective"):
            parallel["parallel__recompute"] = kind
        elif kind == "overlap":
            parallel["parallel__overlap_grad_reduce"] = True
    return parallel


@pytest.mark.parametrize("name", ["PP2", "TP2", "CP2", "EP2"])
def test_one(name, warm_ranks, tmp_path):
    model = MOE | {"num_layers": 4}
    changes = {"train__global_batch_size": 8, "train__micro_batch_size": 2}
    loss = warm_ranks(1, f"{CASES}:save_gradients", path=tmp_path / "g", model=model, **changes)[0]
    for report in warm_ranks(
        2, f"{CASES}:compare_gradients", path=tmp_path / "g", model=model, **changes, **case(name)
    ):
        assert report["loss"] == pytest.approx(loss, rel=1e-12)
        worst = max(report["errors"], key=report["errors"].get)
        assert report["errors"][worst] < TOLERANCE, (worst, report["errors"])
