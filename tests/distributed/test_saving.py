"""Saving in the background on two ranks: the state of its step, one error for all, no leftovers."""

import pytest
import torch

from pltmoe.checkpoint.integrity import check_files
from pltmoe.checkpoint.manifest import read_manifest
from tests.state_dicts import tensors_of

pytestmark = [pytest.mark.distributed, pytest.mark.xdist_group(__name__)]
CASES = "tests.distributed.save_cases"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_is_saved_behind_training_is_what_a_waiting_save_writes(
    warm_ranks, tmp_path, precision
) -> None:
    """EP2, distributed optimizer, experts' biases: bit for bit the state of the save's step."""
    reports = warm_ranks(
        2,
        f"{CASES}:save_while_training",
        folder=tmp_path,
        train__precision=precision,
        parallel__expert_parallel_size=2,
    )
    for report in reports:
        assert report == {"before its time": [False, False], "left over": []}
    waiting, behind = (tmp_path / name / "step_00000002" for name in ("waiting", "behind"))
    ours, expected = tensors_of(behind), tensors_of(waiting)
    assert len(ours) > 60 and ours.keys() == expected.keys()
    assert [name for name in ours if not torch.equal(ours[name], expected[name])] == []
    check_files(behind, read_manifest(behind))


def test_an_error_on_one_rank_reaches_all_at_a_later_step(warm_ranks, tmp_path) -> None:
    first, second = warm_ranks(2, f"{CASES}:callback_with_an_error", folder=tmp_path)
    for report in (first, second):
        assert report["step"] in (3, 4), "not at the step itself"
        assert report["said"] == (
            f"{tmp_path}/checkpoints/step_00000002: cannot be written (rank 1: No space left on "
            "device); older checkpoints are untouched"
        )
        assert report["left"].name == "step_00000001"
        ((step, metrics),) = report["logged"]
        assert step == 2 and set(metrics) == {
            "checkpoint/save_seconds",
            "checkpoint/stall_seconds",
        }
        assert 0 < metrics["checkpoint/stall_seconds"] <= metrics["checkpoint/save_seconds"] + 1
    assert not list(tmp_path.glob("checkpoints/.writing_*"))


def test_an_output_folder_that_is_not_shared_is_no_checkpoint(warm_ranks, tmp_path) -> None:
    """Each machine with a folder of its own: both would hold half of it, and resume from none."""
    for said in warm_ranks(2, f"{CASES}:folder_of_its_own", folder=tmp_path):
        assert said == (
            f"{tmp_path}/node0/step_00000001: cannot be written (rank 1 wrote __1_0.distcp, which "
            "rank 0 does not see: train.output_dir must lie on a file system that all machines "
            "share); older checkpoints are untouched"
        )
    assert not list(tmp_path.glob("node0/*step_*"))


def test_ranks_share_the_check_and_agree(warm_ranks, tmp_path) -> None:
    reports = warm_ranks(2, f"{CASES}:damaged_on_a_rank", folder=tmp_path)
    assert reports == [["step_00000001", "1"]] * 2
    assert (tmp_path / "checkpoints/damaged_step_00000002").is_dir()
