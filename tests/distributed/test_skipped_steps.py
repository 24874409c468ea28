"""A step that is skipped leaves no trace but its number: on all ranks alike, resumed or not."""

import re

import pytest

from pltmoe.checkpoint import folders
from tests.distributed.pretrain_cases import same
from tests.distributed.run_files import curve_of
from tests.distributed.skip_cases import SICK

pytestmark = [pytest.mark.distributed, pytest.mark.xdist_group(__name__)]
CASES = "tests.distributed.skip_cases"
EP2 = {"parallel__expert_parallel_size": 2}
PP2 = {"parallel__pipeline_parallel_size": 2}
TP2 = {"parallel__tensor_parallel_size": 2}


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("loss", EP2),
        ("loss", PP2),
        ("gradient", EP2 | {"train__precision": "bf16"}),
        ("spike", PP2),
        ("spike", TP2 | {"optimizer__clip_grad_norm": 0.0}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value)),
)
def test_a_skipped_step_changes_nothing_and_later_steps_are_as_if_it_had_not_been(
    warm_ranks, kind, changes
):
    """Bit for bit: weights, expert biases, master weights, moments, Adam's counts, statistics."""
    ranks = warm_ranks(2, f"{CASES}:skipped_and_left_out", kind=kind, **changes)
    for report in ranks:
        skipped, left_out = report["skipped"], report["left out"]
        assert skipped["untouched"] and skipped["skipped"] == [SICK]
        assert skipped["totals"] == [0, 0, 1, 1, 1] and left_out["totals"] == [0, 0, 0, 0]
        sick = skipped["numbers"].pop(SICK)
        assert skipped["numbers"] == left_out["numbers"]
        rates = [skipped["numbers"][2][2], sick[2], skipped["numbers"][4][2]]
        assert rates[0] < rates[1] > rates[2], "warm-up ends with the skipped step"
        assert skipped["metrics"] == left_out["metrics"] != {}
        assert same(skipped["end"], left_out["end"])
    first, second = (rank["skipped"]["numbers"] for rank in ranks)
    assert first == second, "loss and norm are the same to the last bit on both ranks"


STEPS = 12


@pytest.fixture(scope="module")
def sick_runs(config, warm_ranks, tmp_path_factory):
    """Two ranks, two stages; NaN in steps 3, 4 and 7, and spikes: straight, and in two legs."""
    straight, legs = (tmp_path_factory.mktemp(name) for name in ("straight", "legs"))
    common = [
        *("--config", str(config), "parallel.pipeline_parallel_size=2"),
        *("train.spike_sigma=1.0", "train.spike_window=3"),
        *("train.max_skipped_in_a_row=4", "optimizer.decay_steps=12", "train.log_interval=6"),
    ]
    arguments = [
        [*common, f"train.output_dir={straight}", f"train.steps={STEPS}"],
        [*common, f"train.output_dir={legs}", "train.steps=7"],
        [*common, f"train.output_dir={legs}", f"train.steps={STEPS}"],
    ]
    logs = []
    for leg in arguments:
        target = f"{CASES}:run_with_sick_data"
        (code, log), _ = warm_ranks(2, target, arguments=leg, steps=[3, 4, 7])
        assert code == 0, log
        logs.append(log)
    return straight, legs, logs


def test_skipped_steps_are_counted_told_and_tracked(sick_runs):
    straight, _, (log, *_) = sick_runs
    told = re.findall(r"WARNING step (\d+) is skipped.*\((\d) in a row, (\d+) in all\): (.*)", log)
    assert [line[:3] for line in told][:2] == [("3", "1", "1"), ("4", "2", "2")]
    assert told[0][3] == "the loss is not finite (rank 1: nan)"
    assert "is a spike: mean" in log, "choose data with more noise"
    tracked = {line["step"]: line for line in curve_of(straight)}
    assert {3, 4, 6, 7, 12} <= tracked.keys(), "at their own step, whatever the interval"
    assert tracked[3]["train/loss"] == "NaN" and tracked[4]["train/skipped_steps"] == 2
    assert tracked[12]["train/skipped_steps"] == len(told)
    assert f"skipped {len(told)}" in log.split("step 12/12")[1]


def test_resumed_in_the_middle_of_a_row_equals_straight(sick_runs, warm_ranks):
    """Window, counters and Adam's count of steps come back: the checkpoint is of skipped step 7."""
    straight, legs, logs = sick_runs
    assert "(step 7)" in logs[2]
    decided = [re.findall(r"step \d+ is skipped.*", log) for log in logs]
    assert decided[0] == decided[1] + decided[2]
    assert "is a spike" in "".join(decided[2][:2]), "the window of before the resume decides"
    skipped = {line["step"] for line in curve_of(straight)} - {1, 6, 12}
    assert [line for line in curve_of(legs) if line["step"] != 7] == [
        line for line in curve_of(straight) if line["step"] != 7
    ]
    assert 7 in skipped
    read = "tests.distributed.pretrain_cases:contents"
    ours, expected = (
        warm_ranks(1, read, folder=folders.latest_checkpoint(output), also="guard")[0]
        for output in (legs, straight)
    )
    assert ours["guard"]["skipped"] == len(decided[0]) and len(ours["guard"]["window"]) == 3
    assert len(ours) > 60 and ours.keys() == expected.keys()
    assert [key for key in ours if not same(ours[key], expected[key])] == []


def test_too_many_in_a_row_stop_the_run_and_nothing_more_is_saved(config, warm_ranks, tmp_path):
    arguments = [
        *("--config", str(config), f"train.output_dir={tmp_path}", "train.steps=9"),
        *("checkpoint.save_interval=2", "train.max_skipped_in_a_row=2"),
        "parallel.expert_parallel_size=2",
    ]
    first, second = warm_ranks(
        2, f"{CASES}:run_with_sick_data", arguments=arguments, steps=[3, 5, 6, 7, 8, 9]
    )
    assert first[0] == second[0] == 2, first
    told = first[1].splitlines()[-1]
    assert told.startswith("error: step 7: the loss is not finite (rank 1: nan). The 2 step(s) be")
    assert "train.max_skipped_in_a_row). Nothing was updated or saved: resume from the la" in told
    assert folders.latest_checkpoint(tmp_path).name == "step_00000006"
    assert "step 7" not in first[1].split("step 7: the loss")[0]
