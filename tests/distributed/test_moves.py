"""What tests/gpu/test_training.py asks of a GPU, asked of this CPU: the same helpers."""

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.moves import assert_continues, assert_repeats, begin_on_cpu

pytestmark = [pytest.mark.distributed, pytest.mark.usefixtures("groups")]


@pytest.fixture(scope="module")
def begun(config: Path, tmp_path_factory: Any) -> Path:
    return begin_on_cpu(config, tmp_path_factory.mktemp("cpu"))


def test_two_deterministic_runs_are_the_same_run(config: Path, tmp_path: Path) -> None:
    assert_repeats(config, tmp_path, "train.deterministic=true", device="cpu")


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 0.0), ("bf16", 0.02)])
def test_a_checkpoint_continues_in_its_precision_and_in_bf16(
    config: Path, begun: Path, tmp_path: Path, precision: str, tolerance: float
) -> None:
    change = f"train.precision={precision}"
    assert_continues(config, begun, tmp_path, change, device="cpu", tolerance=tolerance)
