"""Against a real MLflow server, with real processes that are stopped and killed.

Each test starts its processes first and works while they import mlflow, which takes seconds.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from pltmoe.errors import ConfigError, DataError
from pltmoe.reports.runs import read_mlflow_run, read_run
from pltmoe.tracking import build_tracker
from pltmoe.tracking.delivery import Delivery, _Feed
from pltmoe.tracking.journal import Journal
from pltmoe.tracking.jsonl import NOT_METRICS, JsonlTracker, read_lines
from pltmoe.tracking.mlflow import MLflowTracker, how_to_look
from pltmoe.tracking.sender import Sender
from pltmoe.tracking.sync import sync
from tests.unit.tracking.conftest import ROOT, Server
from tests.unit.tracking.runs import metrics_of, run_config

pytestmark = pytest.mark.xdist_group("mlflow")


def job(run_dir: Path, uri: str, *options: object) -> subprocess.Popen[bytes]:
    """Start a tracked job; see job.py."""
    command = [sys.executable, "-m", "tests.unit.tracking.job", str(run_dir), "--uri", uri]
    environment = os.environ | {"MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL": "0.2"}
    return subprocess.Popen([*command, *map(str, options)], cwd=ROOT, env=environment)


def wait_for_last_step(process: subprocess.Popen[bytes], run_dir: Path) -> None:
    wait_until(lambda: (run_dir / "slowest.json").exists() or process.poll() is not None)
    assert process.poll() is None, "the job ended early"


def run_of(run_dir: Path, server: Server):
    """The run as the server has it."""
    from mlflow.tracking import MlflowClient

    run_id = Journal(run_dir).state(server.uri)["run_id"]
    return MlflowClient(server.uri).get_run(run_id)


def wait_until(condition, timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.2)


def has_run(run_dir: Path, server: Server) -> bool:
    return "run_id" in Journal(run_dir).state(server.uri)


def history(run_dir: Path, server: Server, key: str) -> list[tuple[int, float, int]]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(server.uri)
    points = client.get_metric_history(Journal(run_dir).state(server.uri)["run_id"], key)
    return [(p.step, p.value, p.timestamp) for p in points]


def assert_server_has_the_jsonl(run_dir: Path, server: Server) -> None:
    """Every point of metrics.jsonl is on the server, once, with its value and time."""
    lines = list(read_lines(run_dir / "metrics.jsonl"))
    keys = sorted({key for line in lines for key in line} - NOT_METRICS)
    assert {"train/loss", "moe/load_imbalance/loop_2/layer_03"} <= set(keys)
    for key in keys:
        expected = [(m["step"], m[key], int(m["time"] * 1000)) for m in lines if key in m]
        assert sorted(history(run_dir, server, key)) == expected, key


def test_a_whole_run(server, tmp_path, monkeypatch):
    """Parameters, tags, metrics, artefacts, system metrics, the experiment's kind, FINISHED."""
    run_dir = tmp_path / "run"
    process = job(run_dir, server.uri, "--last", 60, "--pause", 0.02, "--system-metrics")
    assert process.wait(120) == 0
    run = run_of(run_dir, server)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "small"
    assert run.data.params["model.num_loops"] == "2"
    assert run.data.params["train.global_batch_size"] == "8"
    tags = {"commit": "0123abc", "layout": "EP2 x DP1", "model": "small", "resumed": "false"}
    assert tags.items() <= run.data.tags.items()
    assert run.data.tags["mlflow.source.git.commit"] == "0123abc"
    assert "system/cpu_utilization_percentage" in run.data.metrics
    assert not [key for key in run.data.metrics if "gpu" in key and key.startswith("system/")]
    assert_server_has_the_jsonl(run_dir, server)

    from mlflow.tracking import MlflowClient

    client = MlflowClient(server.uri)
    assert [f.path for f in client.list_artifacts(run.info.run_id)] == ["config.yaml"]
    experiment = client.get_experiment(run.info.experiment_id)
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    again = read_mlflow_run(server.uri.replace("://", "://me:secret@"), run.info.run_id)
    assert again.source == f"http://***@127.0.0.1:{server.port} run {run.info.run_id}"
    here = read_run(run_dir)
    assert again.series("train/loss") == here.series("train/loss")
    assert (again.name, again.config, again.status) == (here.name, here.config, "FINISHED")
    with pytest.raises(DataError, match="cannot be read"):
        read_mlflow_run(server.uri, "0" * 32)
    monkeypatch.setattr(MlflowClient, "get_metric_history", lambda *args: [])  # an empty answer
    with pytest.raises(DataError, match="the answer holds no points of "):
        read_mlflow_run(server.uri, run.info.run_id)
    page = f"{server.uri}/#/experiments/{experiment.experiment_id}?workflowType=machine_learning"
    assert how_to_look(run_dir) == page


@pytest.mark.parametrize("setting", ["abc", "-1", "nan", "1e99"])
def test_an_interval_that_is_none_does_not_end_the_sender(setting, tmp_path, monkeypatch, caplog):
    from pltmoe.tracking.system import SystemSampler

    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", setting)
    assert SystemSampler(tmp_path / "system_metrics.jsonl")._interval_s == 10
    assert f"INTERVAL is '{setting}', no time in seconds: 10 s is taken" in caplog.text


def status_of(run_dir: Path, server: Server) -> str:
    return run_of(run_dir, server).info.status if has_run(run_dir, server) else "none yet"


def test_failed_and_vanished_jobs_say_so_and_a_resume_continues_the_run(server, tmp_path):
    """An exception; kill -9 after the checkpoint of step 15; resumed from there; SIGTERM."""
    failed_dir, run_dir = tmp_path / "failed", tmp_path / "killed"
    failed = job(failed_dir, server.uri, "--last", 20, "--raise-at", 7)
    killed = job(run_dir, server.uri, "--last", 20, "--linger")
    assert failed.wait(120) == 1
    wait_until(lambda: status_of(failed_dir, server) == "FAILED")
    assert [step for step, _, _ in history(failed_dir, server, "train/loss")] == list(range(1, 8))

    wait_for_last_step(killed, run_dir)
    wait_until(lambda: status_of(run_dir, server) == "RUNNING")
    wait_until(lambda: len(history(run_dir, server, "train/loss")) == 20)
    killed.kill()
    assert killed.wait(60) == -signal.SIGKILL
    wait_until(lambda: status_of(run_dir, server) == "FAILED")
    before = run_of(run_dir, server)
    assert "kill -9" in before.data.tags["end_reason"]
    first_times = {step: at for step, _, at in history(run_dir, server, "train/loss")}

    options = ("--resume", 15, "--first", 16, "--last", 40, "--linger")
    (run_dir / "slowest.json").unlink()
    resumed = job(run_dir, server.uri, *options)
    wait_for_last_step(resumed, run_dir)
    wait_until(lambda: status_of(run_dir, server) == "RUNNING")
    resumed.send_signal(signal.SIGTERM)
    assert resumed.wait(120) == 143
    wait_until(lambda: status_of(run_dir, server) == "KILLED")
    after = run_of(run_dir, server)
    assert after.info.run_id == before.info.run_id
    assert after.data.tags["resumed"] == "true"
    assert after.data.tags["resumed_from_step"] == "15"
    points = history(run_dir, server, "train/loss")
    assert [step for step, _, _ in points] == list(range(1, 41))  # 16..20 once, as first sent
    assert all(at == first_times[step] for step, _, at in points if step <= 20)
    lines = list(read_lines(run_dir / "metrics.jsonl"))
    assert [line["step"] for line in lines] == list(range(1, 41))


def test_an_outage_loses_and_doubles_nothing_and_never_holds_up_training(server, tmp_path):
    """Frozen (accepts, never answers), gone, and back, while steps go on being logged."""
    config = run_config(tmp_path, server.uri, model__num_loops=2)
    tracker = build_tracker(config, tmp_path, lambda step: step)
    tracker.start({})
    costs_ms, step = [], 0

    def log_for(seconds: float) -> None:
        nonlocal step
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            step += 1
            metrics = metrics_of(step, config)
            began = time.perf_counter()
            tracker.log(step, metrics)
            costs_ms.append(1e3 * (time.perf_counter() - began))
            time.sleep(0.02)

    while not has_run(tmp_path, server):
        log_for(0.2)
    log_for(1)
    server.freeze()
    log_for(2)
    server.thaw()
    server.stop()
    log_for(2)
    server.start(wait=False)
    log_for(1)
    server.wait_until_up()
    tracker.finish("FINISHED")
    assert run_of(tmp_path, server).info.status == "FINISHED"
    assert_server_has_the_jsonl(tmp_path, server)
    assert sorted(costs_ms)[int(0.99 * len(costs_ms))] < 50
    assert sorted(costs_ms)[len(costs_ms) // 2] < 1


def test_no_server_at_all_then_sync_later_and_again(server, tmp_path, caplog):
    """The end of the job waits only as long as it was told; nothing is lost; sync is repeatable."""
    config = run_config(tmp_path, "http://127.0.0.1:9")  # nobody listens there
    tracker = build_tracker(config, tmp_path, lambda step: step)
    tracker._trackers[1]._give_up_s = 1.0
    began = time.monotonic()
    tracker.start({})
    assert time.monotonic() - began < 1.0
    for step in range(1, 301):
        tracker.log(step, metrics_of(step, config))
    tracker.finish("KILLED")
    assert "tools/sync_mlflow.py" in caplog.text or "still sending" in caplog.text
    journal = Journal(tmp_path)
    assert journal.state("http://127.0.0.1:9") == {}
    with journal.lock(wait_s=60.0) as free:  # the sender gives up by itself
        assert free
        with pytest.raises(DataError, match="running job is sending"):
            sync(tmp_path, server.uri)

    first = sync(tmp_path, server.uri)
    assert first.status == "KILLED"
    lines = list(read_lines(tmp_path / "metrics.jsonl"))
    assert first.sent_metrics == sum(len(set(line) - NOT_METRICS) for line in lines)
    report = tmp_path / "report.md"
    report.write_text("# Report\n")
    Journal(tmp_path).append("artifact", path=str(report), folder="report")
    second = sync(tmp_path, server.uri)
    assert second.sent_metrics == 0
    assert second.where == first.where
    run = run_of(tmp_path, server)
    assert run.info.status == "KILLED"
    assert [history(tmp_path, server, "train/loss")[i][0] for i in (0, -1)] == [1, 300]
    assert len(history(tmp_path, server, "train/loss")) == 300

    from mlflow.tracking import MlflowClient

    files = MlflowClient(server.uri).list_artifacts(run.info.run_id, "report")
    assert [file.path for file in files] == ["report/report.md"]
    report.unlink()
    caplog.clear()
    sync(tmp_path, server.uri)
    assert "was gone before" not in caplog.text, "it was sent"


def test_a_run_never_tracked_is_sent_from_its_config(server, tmp_path):
    command = [sys.executable, "-m", "tests.unit.tracking.job", str(tmp_path), "--last", "12"]
    subprocess.run(command, cwd=ROOT, check=True)
    with pytest.raises(ConfigError, match="was not tracked in MLflow.*--uri URI"):
        sync(tmp_path)
    absent = str(tmp_path / "absent")  # one that fails does not keep the others from being sent
    tool = [sys.executable, "tools/sync_mlflow.py", absent, str(tmp_path), "--uri", server.uri]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(tool, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert f"error: {absent}: no metrics.jsonl here" in done.stderr
    assert "FINISHED" in done.stdout  # as run.json says
    tags = run_of(tmp_path, server).data.tags
    assert {"commit": "0123abc", "layout": "EP2 x DP1", "resumed": "false"}.items() <= tags.items()
    assert sync(tmp_path, server.uri, status="KILLED").status == "KILLED"
    assert run_of(tmp_path, server).info.status == "KILLED"
    assert_server_has_the_jsonl(tmp_path, server)

    lines = JsonlTracker(tmp_path, lambda step: step)  # goes on, still without MLflow
    lines.start({"layout": "EP4"}, resume_step=12)
    lines.log(13, {"train/loss": 1.0})
    assert sync(tmp_path, server.uri).status == "RUNNING"
    lines.finish("FAILED")
    assert sync(tmp_path, server.uri).status == "FAILED"
    run = run_of(tmp_path, server)
    assert (run.info.status, run.data.tags["layout"]) == ("FAILED", "EP4")
    assert run.data.tags["resumed_from_step"] == "12"


def test_only_a_failure_that_lasts_is_told_and_once(tmp_path, caplog, monkeypatch):
    """A busy server may have a short one every minute of a run of weeks."""
    delivery = Delivery(tmp_path, "http://127.0.0.1:9")
    sender = Sender(delivery, "attempt", 1.0)
    answers = iter([OSError(), True, OSError(), OSError(), OSError(), True])
    clock = SimpleNamespace(now=50.0, monotonic=lambda: clock.now)
    monkeypatch.setattr("pltmoe.tracking.sender.time", clock)

    def deliver() -> bool:
        answer = next(answers)
        clock.now += 3.0
        if isinstance(answer, OSError):
            raise answer
        clock.now += 100.0  # what has gathered is sent
        return answer

    monkeypatch.setattr(delivery, "deliver", deliver)
    assert [sender._try(hurry=False) for _ in range(3)] == [None, True, None]
    assert not caplog.messages
    monkeypatch.setattr("pltmoe.tracking.sender._BLIP_S", 0.0)
    assert [sender._try(hurry=False) for _ in range(3)] == [None, None, True]
    assert len(caplog.messages) == 2
    assert "will try again" in caplog.messages[0]
    assert caplog.messages[1] == "answers again after 6 s"


def test_a_run_deleted_in_mlflow_is_left_alone(server, tmp_path):
    from mlflow.tracking import MlflowClient

    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "time": 1.0, "a": 1.0}\n')
    MLflowTracker(run_config(tmp_path, server.uri), tmp_path).record_start({}, None)
    delivery = Delivery(tmp_path, server.uri)
    delivery.deliver()
    MlflowClient(server.uri).delete_run(run_of(tmp_path, server).info.run_id)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 2, "time": 2.0, "a": 2.0}) + "\n")
    with pytest.raises(DataError, match="deleted in MLflow"):
        sync(tmp_path, server.uri)


def test_sync_names_what_is_wrong(tmp_path):
    with pytest.raises(DataError, match=r"no metrics\.jsonl here"):
        sync(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    config = run_config(tmp_path, "http://user:secret@127.0.0.1:9")
    MLflowTracker(config, tmp_path).record_start({}, None)
    with pytest.raises(ConfigError, match="password is not stored"):
        sync(tmp_path)
    for read in (lambda uri: sync(tmp_path, uri), lambda uri: read_mlflow_run(uri, "0" * 32)):
        with pytest.raises(DataError, match=r"^http://\*\*\*@127\.0\.0\.1:9 ") as caught:
            read("http://user:secret@127.0.0.1:9")
        assert "secret" not in str(caught.value)
    with pytest.raises(DataError, match=r"127\.0\.0\.1:9 does not take the run"):
        sync(tmp_path, "http://127.0.0.1:9")


def test_a_job_whose_end_no_event_tells_ended_as_run_json_says(tmp_path):
    """The disk was full when MLflow's event of the end was to be written, and is not any more."""
    lines = JsonlTracker(tmp_path, lambda step: step)
    lines.start({})
    tracker = MLflowTracker(run_config(tmp_path, "http://127.0.0.1:9"), tmp_path)
    tracker.record_start({}, None, pid_started="0")  # as if its process were gone
    lines.finish("FINISHED")
    assert Sender(Delivery(tmp_path, "http://127.0.0.1:9"), tracker.attempt, 1.0)._has_ended()
    assert Journal(tmp_path).last_end()["status"] == "FINISHED"


def test_a_feed_goes_on_where_it_was_and_starts_over_when_the_file_was_replaced(tmp_path):
    """A resume replaces metrics.jsonl; a position in the old file means nothing in the new one."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "a": 1}\n{"step": 2, "a": 1}\n{"step": 3, "a"')
    feed = _Feed(path)
    assert [line["step"] for line in feed.read(10)] == [1, 2]
    assert [line["step"] for line in feed.read(1)] == [1]  # not acknowledged: again
    feed.acknowledge()
    assert [line["step"] for line in feed.read(10)] == [2]
    feed.acknowledge()
    assert feed.read(10) == []
    with path.open("a") as file:
        file.write(": 1}\n")
    assert [line["step"] for line in feed.read(10)] == [3]
    new = tmp_path / "new"
    new.write_text("".join(f'{{"step": {step}, "a": 1}}\n' for step in (1, 2, 30, 40, 50)))
    new.replace(path)
    assert [line["step"] for line in feed.read(10)] == [1, 2, 30, 40, 50]
