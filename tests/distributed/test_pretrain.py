"""Real runs of tools/pretrain.py: killed and resumed, stopped, moved, and told wrong things."""

import fcntl
import os
import re
import shutil
import signal
import sqlite3
from pathlib import Path

import pytest
from torch.distributed.checkpoint import FileSystemReader

from pltmoe.checkpoint import folders
from pltmoe.checkpoint.manifest import read_manifest
from tests.distributed.pretrain_cases import same
from tests.distributed.run_files import curve_of, finish, lines_of, start_ranks, wait_for
from tests.repository import REPOSITORY

pytestmark = [pytest.mark.distributed, pytest.mark.xdist_group(__name__)]
CASES = "tests.distributed.pretrain_cases"
STEPS = 12
METRICS_PAGE = REPOSITORY / "docs/metrics.md"


@pytest.fixture(scope="module")
def run(config, warm_ranks):
    """``run(output, *overrides)`` in a warm process: exit code, log."""

    def tool(output: Path, *overrides: str) -> tuple[int, str]:
        arguments = ["--config", str(config), f"train.output_dir={output}", *overrides]
        return warm_ranks(1, f"{CASES}:run_many", cases={"only": arguments})[0]["only"]

    return tool


@pytest.fixture(scope="module")
def straight(run, tmp_path_factory) -> tuple[Path, str]:
    """A run of all steps in one go: its folder and its log."""
    output = tmp_path_factory.mktemp("straight")
    code, log = run(output, f"train.steps={STEPS}")
    assert code == 0, log
    return output, log


def test_log_and_metrics_of_a_run(straight):
    output, log = straight
    assert not any("WARNING" in line for line in log.splitlines())
    for row in ("versions", "commit", "device", "layout", "parameters", "FLOPs per token"):
        assert re.search(rf"^  {row} +\S", log, re.M), row
    assert re.search(
        r"^  data +\S+: 100.0% of the sequences, \S+ times through [\d,]+ tok", log, re.M
    )
    assert re.search(r"^  validation +every 4 steps$", log, re.M)
    assert "the CPU stands in for CUDA" in log and "DP1 (1 process" in log
    assert re.search(r"^  optimizer +(torch|TE|Apex) \(", log, re.M)
    line = r"step 12/12  loss \d\.\d{4}  lr \S+  grad \S+  [\d,]+ tokens/s  \S+ TFLOP/s.*  ETA 0:00"
    assert re.search(line, log)
    metrics = curve_of(output)
    assert [line["step"] for line in metrics] == list(range(1, STEPS + 1))
    assert {line["step"] for line in metrics if "valid/loss" in line} == {4, 8, 12}
    names = {name for line in metrics for name in line} - {"step", "tokens"}
    listed = re.findall(r"^\| `([\w/]+)`", METRICS_PAGE.read_text(), re.M)
    bases = {re.sub(r"(/loop_\d+)?(/layer_\d+)?$", "", name) for name in names}
    assert bases <= set(listed) and len(listed) == len(set(listed)), METRICS_PAGE
    assert {"moe/aux_loss/loop_2", "moe/expert_overlap/loop_2/layer_02"} <= names
    assert {"plt/gate_mean/loop_2", "moe/load_imbalance/loop_1/layer_01"} <= names
    assert metrics[-1]["tokens"] == STEPS * 4 * 16
    assert metrics[-1]["train/loss"] < metrics[0]["train/loss"]
    manifest = read_manifest(folders.latest_checkpoint(output))
    assert (manifest.step, manifest.consumed_samples, manifest.tokens) == (12, 48, 768)


def test_the_cost_of_every_save_is_tracked(straight):
    output, log = straight
    saves = [line for line in lines_of(output) if "checkpoint/save_seconds" in line]
    assert len(saves) == 3 == log.count("training stood still for"), "steps 4, 8 and 12"
    steps = [line["step"] for line in saves]
    assert steps == sorted(steps) and steps[-1] == 12 and steps[0] > 4, "whole at a later step"
    for line in saves:
        assert 0 < line["checkpoint/stall_seconds"] <= line["checkpoint/save_seconds"] + 1
        for name in ("checkpoint/save_seconds", "checkpoint/stall_seconds"):
            assert f"| `{name}` | s |" in METRICS_PAGE.read_text()


def test_killed_run_resumes_bit_for_bit(config, run, straight, warm_ranks, tmp_path):
    """kill -9 between checkpoints, resume, Ctrl-C, resume: the same as never stopped."""
    arguments = (f"train.output_dir={tmp_path}", f"train.steps={STEPS}")
    (first,) = start_ranks(config, *arguments)
    wait_for(first, "step 6/12")
    with (tmp_path / ".in_use").open("r+") as lock, pytest.raises(BlockingIOError):
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    first.kill()
    finish([first])
    leftover = tmp_path / "checkpoints" / ".writing_step_00000099"
    leftover.mkdir()
    assert folders.latest_checkpoint(tmp_path).name == "step_00000004"

    (second,) = start_ranks(config, *arguments)
    log = wait_for(second, "step 5/12")
    second.send_signal(signal.SIGINT)
    codes, outputs = finish([second])
    assert codes == [130], outputs
    assert "resumed from" in log and "(step 4)" in log and not leftover.exists()
    assert "SIGINT: finishing this step, then saving and stopping" in outputs[0]
    stopped_at = read_manifest(folders.latest_checkpoint(tmp_path)).step
    assert 5 <= stopped_at < STEPS

    code, log = run(tmp_path, f"train.steps={STEPS}")
    assert code == 0 and f"(step {stopped_at})" in log
    assert curve_of(tmp_path) == curve_of(straight[0])
    ours, expected = (
        warm_ranks(1, f"{CASES}:contents", folder=folders.latest_checkpoint(output))[0]
        for output in (tmp_path, straight[0])
    )
    assert ours.keys() == expected.keys()
    assert len(ours) > 60 and any("expert_bias" in key for key in ours)
    assert [key for key in ours if not same(ours[key], expected[key])] == []


def test_a_flipped_bit_in_the_newest_checkpoint_costs_steps_not_the_run(run, straight, tmp_path):
    """The run says so, goes on from the one before, and ends as if nothing had been."""
    shutil.copytree(straight[0], tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    with (checkpoints / "step_00000012/__0_0.distcp").open("r+b") as shard:
        shard.seek(5000)
        byte = shard.read(1)[0]
        shard.seek(5000)
        shard.write(bytes([byte ^ 4]))
    code, log = run(tmp_path / "run", f"train.steps={STEPS}")
    assert code == 0 and "(step 8)" in log, log
    assert f"{checkpoints}/step_00000012: __0_0.distcp has changed since it was written" in log
    assert "going on from" in log and (checkpoints / "damaged_step_00000012").is_dir()
    assert curve_of(tmp_path / "run") == curve_of(straight[0])
    assert folders.latest_checkpoint(tmp_path / "run").name == "step_00000012"


def test_a_corpus_changed_under_a_run_is_refused(run, config, straight):
    tokens = config.with_name("corpus.bin")
    before = tokens.read_bytes()
    tokens.write_bytes(before[::-1])
    try:
        code, log = run(straight[0], f"train.steps={STEPS}")
    finally:
        tokens.write_bytes(before)
    assert code == 2 and "data.contents: " in log and "corpus (.bin, .idx) is not the text" in log


def test_sigterm_to_one_rank_stops_both_and_the_run_moves_on(config, run, tmp_path):
    """Two ranks, EP=2, MLflow: KILLED; then one process continues the same run to its end."""
    database = tmp_path / "mlflow.db"
    common = (
        f"train.output_dir={tmp_path / 'run'}",
        "optimizer.decay_steps=500",
        f"tracking.mlflow_uri=sqlite:///{database}",
        "tracking.system_metrics=false",
    )
    ranks = start_ranks(
        config, *common, "train.steps=500", "parallel.expert_parallel_size=2", nprocs=2
    )
    log = wait_for(ranks[0], "step 3/500")
    os.kill(ranks[1].pid, signal.SIGTERM)
    codes, outputs = finish(ranks)
    assert codes == [143, 143], outputs
    assert "EP2 x DP2" in log and re.search(r"stopped at step \d+: a signal asked", outputs[0])
    step = read_manifest(folders.latest_checkpoint(tmp_path / "run")).step
    assert step >= 3 and curve_of(tmp_path / "run")[-1]["step"] == step
    assert mlflow_runs(database) == [("tiny", "KILLED")]

    code, log = run(tmp_path / "run", *common, f"train.steps={step + 2}")
    assert code == 0 and f"(step {step})" in log and "DP1 (1 process" in log
    assert mlflow_runs(database) == [("tiny", "FINISHED")]
    losses = [line["train/loss"] for line in curve_of(tmp_path / "run")]
    assert len(losses) == step + 2 and abs(losses[-1] - losses[step - 1]) < 0.5


def mlflow_runs(database: Path) -> list[tuple[str, str]]:
    with sqlite3.connect(database) as connection:
        return connection.execute("select name, status from runs").fetchall()


def test_stages_train_the_same_run_and_take_it_over(config, straight, tmp_path):
    """PP2 through the front door: the curve of one process; then TP2 continues its checkpoint."""
    output, _ = straight
    arguments = [f"train.output_dir={tmp_path}", "parallel.pipeline_parallel_size=2"]
    codes, outputs = finish(start_ranks(config, *arguments, "train.steps=8",
                                        "optimizer.decay_steps=12", nprocs=2))  # fmt: skip
    assert codes == [0, 0], outputs
    assert "PP2 x DP1" in outputs[0]
    assert (
        "interleaved 1F1B, 2 stages x 2 loop(s) x 1 model chunk(s): stages wait 11.1%" in outputs[0]
    )
    arguments[1:] = ["parallel.tensor_parallel_size=2", f"train.steps={STEPS}"]
    codes, outputs = finish(start_ranks(config, *arguments, nprocs=2))
    assert codes == [0, 0], outputs
    assert "TP2 x DP1" in outputs[0] and "(step 8)" in outputs[0]
    got, expected = curve_of(tmp_path), curve_of(output)
    assert [line["step"] for line in got] == [line["step"] for line in expected]
    for ours, theirs in zip(got, expected, strict=True):
        # fp32 sums in another order, through 12 steps of Adam
        assert ours == pytest.approx(theirs, rel=2e-3), ours["step"]


def test_weights_alone_start_a_new_run(run, straight, tmp_path):
    folder = folders.latest_checkpoint(straight[0])
    code, log = run(tmp_path, f"checkpoint.load_weights={straight[0]}", "train.steps=4")
    assert code == 0 and f"from {folder} (step 12 of tiny); new optimizer" in log
    first, untrained = curve_of(tmp_path)[0], curve_of(straight[0])[0]
    assert first["step"] == 1 and first["optim/lr"] == 0.0
    assert first["train/loss"] < untrained["train/loss"] - 0.3  # of the same sequences


def test_an_accepted_batch_size_counts_from_where_the_run_was(run, straight, tmp_path):
    """Twelve steps of four sequences, then two of eight; sequences of 16 tokens."""
    shutil.copytree(straight[0], tmp_path / "run")
    more = ("train.global_batch_size=8", "checkpoint.accept_changes=[train.global_batch_size]")
    code, log = run(tmp_path / "run", "train.steps=14", f"optimizer.decay_steps={STEPS}", *more)
    assert code == 0 and "accepted change: train.global_batch_size" in log, log
    manifest = read_manifest(folders.latest_checkpoint(tmp_path / "run"))
    assert (manifest.step, manifest.consumed_samples, manifest.tokens) == (14, 64, 64 * 16)
    assert [line["tokens"] // 16 for line in curve_of(tmp_path / "run")[-3:]] == [48, 56, 64]
    assert curve_of(tmp_path / "run")[-1]["train/tokens"] == 64 * 16


def test_expert_biases_may_be_turned_off_and_on_where_that_is_accepted(run, straight, tmp_path):
    shutil.copytree(straight[0], tmp_path / "run")
    path = "model.moe_expert_bias_update_rate"
    same = (f"optimizer.decay_steps={STEPS}", "checkpoint.keep_last=9")
    more = (*same, f"checkpoint.accept_changes=[{path}]")
    for steps, rate, has in ((STEPS + 1, 0.0, False), (STEPS + 2, 0.02, True)):
        code, log = run(tmp_path / "run", f"train.steps={steps}", f"{path}={rate}", *more)
        assert code == 0 and f"accepted change: {path}" in log, log
        folder = folders.latest_checkpoint(tmp_path / "run")
        keys = FileSystemReader(folder).read_metadata().state_dict_metadata
        assert any(key.endswith("expert_bias") for key in keys) == has
    folders.point_to(tmp_path / "run" / "checkpoints" / "step_00000012")  # somebody goes back
    code, log = run(tmp_path / "run", f"train.steps={STEPS + 1}", *same)
    assert code == 0 and "the later step_00000013 is now left_step_00000013" in log, log
    left = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("left_*"))
    assert left == ["left_step_00000013", "left_step_00000014"]


def test_a_finished_run_stays_as_it_is(run, straight):
    before = (straight[0] / "metrics.jsonl").read_bytes()
    code, log = run(straight[0], f"train.steps={STEPS}")
    assert code == 0 and "finished at step 12" in log
    assert (straight[0] / "metrics.jsonl").read_bytes() == before


@pytest.fixture(scope="module")
def mistakes(config, straight, warm_ranks, tmp_path_factory):
    """Every mistake of one process, in one warm process: name -> (exit code, standard error)."""
    base = ["--config", str(config)]
    new = f"train.output_dir={tmp_path_factory.mktemp('mistakes') / 'run'}"
    old = f"train.output_dir={straight[0]}"
    file = tmp_path_factory.mktemp("file") / "file"
    file.write_text("")
    full = tmp_path_factory.mktemp("full")
    (full / "run.json.new").mkdir()
    weights = f"checkpoint.load_weights={folders.latest_checkpoint(straight[0])}"
    cases = {
        "no file": ["--config", "nowhere.yaml"],
        "dashes": [*base, "--train.steps", "20"],
        "unknown key": [*base, "train.stepz=3"],
        "layout": [*base, new, "parallel.expert_parallel_size=2"],
        "data": [*base, new, f"data.train=[{{path: {file.parent}/text}}]"],
        "changed": [*base, old, f"train.steps={STEPS}", "optimizer.lr=0.5", "train.seed=4"],
        "behind": [*base, old, "train.steps=6", "optimizer.decay_steps=12"],
        "no resume": [*base, old, f"train.steps={STEPS}", "checkpoint.resume=false"],
        "weights": [*base, new, weights, "model.num_layers=3"],
        "no weights": [*base, new, "checkpoint.load_weights=/nowhere"],
        "no server": [*base, new, "tracking.mlflow_uri=localhost:5000"],
        "records": [*base, f"train.output_dir={full}"],
        "output": [*base, f"train.output_dir={file}/run"],
    }
    return warm_ranks(1, f"{CASES}:run_many", cases=cases)[0]


def test_a_configuration_that_does_not_fit_leaves_the_run_as_it_is(mistakes, straight):
    assert mistakes["changed"][0] == 2
    assert "lr: 0.5" not in (straight[0] / "config.yaml").read_text()


def test_records_that_cannot_be_written_are_no_crash(mistakes):
    """Not exit code 1, after which Slurm's script would start the job again elsewhere."""
    code, output = mistakes["records"]
    assert code == 2 and "Traceback" not in output, output
    assert "run.json.new: cannot be written (Is a directory)" in output.splitlines()[-1]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no file", "nowhere.yaml: no such config file"),
        ("dashes", "--train.steps: fields are given without dashes, as in train.steps=20"),
        ("unknown key", "train.stepz: unknown key (value 3); did you mean steps?"),
        (
            "layout",
            "1 process(es) cannot be split into groups of parallel.expert_parallel_size (2)",
        ),
        ("data", "/text"),
        ("changed", "optimizer.lr: checkpoint 0.005, config 0.5; train.seed: checkpoint 1234, con"),
        ("behind", "is at step 12, past train.steps (6)"),
        ("no resume", "is there already, and checkpoint.resume is false"),
        ("weights", "model.num_layers: checkpoint 2, config 3"),
        ("no weights", "/nowhere: neither a checkpoint folder (with manifest.json) nor a run"),
        ("no server", "tracking.mlflow_uri ('localhost:5000'): expected http://HOST:PORT"),
        ("output", "train.output_dir ("),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(mistakes, name, message):
    code, output = mistakes[name]
    lines = output.splitlines()
    assert code == 2, output
    assert lines[-1].startswith("error: ") and message in lines[-1], output
    assert "Traceback" not in output and len(lines) == 1, output


def test_on_two_ranks_only_rank_zero_tells_what_both_know(config, warm_ranks, tmp_path):
    arguments = ["--config", str(config), f"train.output_dir={tmp_path}/run"]
    bad = [*arguments, f"data.train=[{{path: {tmp_path}/text}}]"]
    first, second = warm_ranks(2, f"{CASES}:run_many", cases={"bad": bad})
    assert first["bad"][0] == 2 and f"error: {tmp_path}/text" in first["bad"][1]
    assert second["bad"] == (2, "")
