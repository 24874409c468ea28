"""What tests/gpu/test_training.py asks of a GPU, asked of this CPU: the same helpers."""

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.moves import assert_continues, assert_repeats
from tests.distributed.run_files import make_files

pytestmark = [pytest.mark.distributed, pytest.mark.usefixtures("groups")]


@pytest.fixture(scope="module")
def config(tmp_path_factory: Any) -> Path:
    return make_files(tmp_path_factory.mktemp("files"))


def test_two_deterministic_runs_are_the_same_run(config: Path, tmp_path: Path) -> None:
    assert_repeats(config, tmp_path, "train.deterministic=true", device="cpu")


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 0.0), ("bf16", 0.02)])
def test_a_checkpoint_continues_in_its_precision_and_in_bf16(
    config: Path, tmp_path: Path, precision: str, tolerance: float
) -> None:
    changes = (f"train.precision={precision}",)
    assert_continues(config, tmp_path, *changes, device="cpu", tolerance=tolerance)
