"""What MLflow has of a run of several legs, from sender to sender: nothing missing, nothing twice.

Against a real MLflow server. Legs are written as a job writes them, and delivered in this process.
"""

import json
import sqlite3
import time
from pathlib import Path
from typing import Any

import pytest

from pltmoe.config import write_config
from pltmoe.reports.runs import read_mlflow_run
from pltmoe.tracking.delivery import Delivery
from pltmoe.tracking.journal import Journal
from pltmoe.tracking.jsonl import JsonlTracker, read_lines
from pltmoe.tracking.mlflow import MLflowTracker
from pltmoe.tracking.sender import Sender
from pltmoe.tracking.sync import sync
from tests.unit.tracking.runs import run_config
from tests.unit.tracking.test_delivery import history, run_of

pytestmark = pytest.mark.xdist_group("mlflow")


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a sender tries again is done once here: a server on a busy machine may take its time."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "120")


def leg(
    run_dir: Path,
    uri: str,
    first: int,
    last: int,
    loss: float,
    sent: bool = True,
    every: int = 1,
    tracked: bool = True,
    **changes: Any,
) -> None:
    """Steps ``first`` to ``last`` after a resume before them; ``sent``: then delivered.

    Logged are the multiples of ``every``; not ``tracked``: without MLflow.
    """
    resume = first - 1 or None
    lines = JsonlTracker(run_dir, lambda step: step)
    lines.start({}, resume_step=resume)
    config = run_config(run_dir, uri, data__tokenizer="x" * 7000, **changes)
    write_config(config, run_dir / "config.yaml")
    if tracked:
        MLflowTracker(config, run_dir).record_start({}, resume_step=resume)
    time.sleep(0.005)  # a point of the same millisecond as the start would be of the leg before
    for step in range(-(-first // every) * every, last + 1, every):
        odd = {"odd [name]": float("nan"), "optim/grad_norm": float("-inf")}
        lines.log(step, {"train/loss": loss + step, **odd})
    lines.finish("FINISHED")
    if tracked and sent:
        Delivery(run_dir, uri).deliver()


def test_steps_done_again_with_other_settings_replace_those_given_up(server, tmp_path):
    """MLflow keeps parameters and points as they were first; tags and later points say better."""

    def losses() -> list[tuple[int, float]]:
        run = read_mlflow_run(server.uri, run_of(tmp_path, server).info.run_id)
        return [(point.step, point.value) for point in run.series("train/loss")]

    def expected() -> list[tuple[int, float]]:
        return [(m["step"], m["train/loss"]) for m in read_lines(tmp_path / "metrics.jsonl")]

    def changed() -> str | None:
        return run_of(tmp_path, server).data.tags.get("changed.optimizer.lr")

    leg(tmp_path, server.uri, 1, 8, 0.0)
    leg(tmp_path, server.uri, 6, 8, 0.0)
    assert len(history(tmp_path, server, "train/loss")) == 8  # the same settings: the same points
    assert changed() is None
    leg(tmp_path, server.uri, 5, 6, 0.5, optimizer__lr=5e-4)
    assert losses() == expected() and len(expected()) == 6  # 7 and 8 were given up
    sync(tmp_path, server.uri)
    assert len(history(tmp_path, server, "train/loss")) == 10  # 5 and 6 twice, and no more
    leg(tmp_path, server.uri, 7, 12, 0.5, optimizer__lr=5e-4)
    assert losses() == expected() and len(expected()) == 12
    assert changed() == "0.0005 since step 4"
    assert sync(tmp_path, server.uri).sent_metrics == 0
    leg(tmp_path, server.uri, 11, 13, 0.0)
    assert losses() == expected()
    assert changed() == "0.0005 since step 4, then 0.001 since step 10"
    leg(tmp_path, server.uri, 3, 4, 0.0)  # back to before the change
    assert losses() == expected()
    assert changed() is None
    leg(tmp_path, server.uri, 3, 12, 0.7, every=4, optimizer__lr=5e-4)  # not all steps given up
    assert losses() == expected() == [(1, 1.0), (2, 2.0), (4, 4.7), (8, 8.7), (12, 12.7)]
    leg(tmp_path, server.uri, 7, 8, 0.9, every=8, optimizer__lr=1e-4)
    assert losses() == expected() == [(1, 1.0), (2, 2.0), (4, 4.7), (8, 8.9)]
    run = run_of(tmp_path, server)
    branches = json.loads(run.data.tags["pltmoe.branches"])
    assert [step for _, step in branches] == [2, 6]  # not those before that go back as far
    assert run.data.params["optimizer.lr"] == "0.001"
    assert len(run.data.params["data.tokenizer"]) == 6000
    assert str(run.data.metrics["odd _name_"]) == "nan"


def test_what_was_not_sent_of_a_branch_is_sent_with_the_next(server, tmp_path):
    """The server was away for the whole leg that changed a setting."""
    leg(tmp_path, server.uri, 1, 8, 0.0)
    leg(tmp_path, server.uri, 4, 6, 0.5, sent=False, optimizer__lr=5e-4)
    leg(tmp_path, server.uri, 6, 7, 0.7, optimizer__lr=1e-4)
    run = read_mlflow_run(server.uri, run_of(tmp_path, server).info.run_id)
    assert [p.value for p in run.series("train/loss")] == [1, 2, 3, 4.5, 5.5, 6.7, 7.7]
    assert [p.value for p in run.series("optim/grad_norm")] == 7 * [float("-inf")]


def test_a_job_without_mlflow_between_two_with_it_is_a_branch_as_well(
    server, tmp_path, monkeypatch, caplog
):
    """Also where a clock is behind: MLflow was not sent what such a job did, without a word."""

    def losses() -> list[float]:
        run = read_mlflow_run(server.uri, run_of(tmp_path, server).info.run_id)
        return [point.value for point in run.series("train/loss")]

    leg(tmp_path, server.uri, 1, 8, 0.0)
    leg(tmp_path, server.uri, 4, 6, 0.5, tracked=False, optimizer__lr=5e-4)
    leg(tmp_path, server.uri, 6, 7, 0.0)
    assert losses() == [1, 2, 3, 4.5, 5.5, 6, 7]
    leg(tmp_path, server.uri, 3, 6, 0.7, tracked=False, optimizer__lr=5e-4)
    leg(tmp_path, server.uri, 5, 6, 0.0, tracked=False)
    sync(tmp_path, server.uri)
    assert losses() == [1, 2, 3.7, 4.7, 5, 6]

    # The next machines' clocks are an hour and half an hour behind those of the jobs before.
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now - 3600)
    leg(tmp_path, server.uri, 5, 7, 0.5, optimizer__lr=1e-4)
    assert losses() == [1, 2, 3.7, 4.7, 5.5, 6.5, 7.5]
    assert "s behind the times that the run has recorded" in caplog.text
    monkeypatch.setattr(time, "time", lambda: now - 1800)
    leg(tmp_path, server.uri, 6, 7, 0.0, tracked=False, optimizer__lr=5e-4)
    sync(tmp_path, server.uri)
    assert losses() == [1, 2, 3.7, 4.7, 5.5, 6, 7]
    times = [line["time"] for line in read_lines(tmp_path / "metrics.jsonl")]
    assert times == sorted(times)


def test_a_job_that_begins_while_the_one_before_is_sent(server, tmp_path):
    """The sender of a killed job is at work on a long file when the next one writes it anew."""
    leg(tmp_path, server.uri, 1, 8, 0.0, sent=False)
    late = Delivery(tmp_path, server.uri, on_batch=lambda size: meanwhile and meanwhile.pop()())
    meanwhile = [lambda: leg(tmp_path, server.uri, 4, 9, 0.5, sent=False, optimizer__lr=5e-4)]
    late.deliver()
    sync(tmp_path, server.uri)
    run = read_mlflow_run(server.uri, run_of(tmp_path, server).info.run_id)
    assert [p.value for p in run.series("train/loss")] == [1, 2, 3, 4.5, 5.5, 6.5, 7.5, 8.5, 9.5]
    leg(tmp_path, server.uri, 4, 11, 0.7, tracked=False)  # its lines are not the late sender's
    late.deliver()
    assert late.bytes_waiting() == 0
    sync(tmp_path, server.uri)
    run = read_mlflow_run(server.uri, run_of(tmp_path, server).info.run_id)
    assert [p.value for p in run.series("train/loss")] == [
        1,
        2,
        3,
        *(n + 0.7 for n in range(4, 12)),
    ]


def test_a_server_that_lost_some_of_a_run_gets_it_again(server, tmp_path, monkeypatch):
    """A file (a login page was the answer), points, the whole run (an older database is back)."""
    from mlflow.exceptions import MlflowException

    def fails(method: str, error: str) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(live._client, method, lost)
            with pytest.raises(MlflowException, match=error):
                live.deliver()

    def lost(*args: object, **kwargs: object) -> None:
        if "metrics" in kwargs:
            raise MlflowException("no answer")

    def forget(*statements: str) -> None:
        with sqlite3.connect(server.folder / "mlflow.db") as database:
            for statement in statements:
                database.execute(f"{statement} AND run_uuid = '{live._run_id}'")

    def add_line(step: int) -> None:
        with (tmp_path / "metrics.jsonl").open("a") as file:
            line = {"step": step, "time": time.time(), "train/loss": float(step)}
            file.write(json.dumps(line) + "\n")

    def steps() -> list[int]:
        return [step for step, _, _ in sorted(history(tmp_path, server, "train/loss"))]

    leg(tmp_path, server.uri, 1, 8, 0.0, sent=False)
    live = Delivery(tmp_path, server.uri)
    live._open_run(Journal(tmp_path).last_start())
    fails("log_artifact", r"config\.yaml did not arrive")
    live.deliver()
    forget("DELETE FROM metrics WHERE step > 4", "UPDATE latest_metrics SET step = 4 WHERE 1")
    add_line(9)
    fails("log_batch", "no answer")
    live.deliver()
    assert steps() == [*range(1, 10)]

    first = live._run_id
    forget("DELETE FROM runs WHERE 1")
    add_line(10)
    fails("log_batch", "no answer")
    run = live._create(Journal(tmp_path).last_start())  # and the answer was lost
    live.deliver()
    double = live._create(Journal(tmp_path).last_start())  # a call that was long on its way
    assert live._run_id == run.info.run_id != first
    assert steps() == [*range(1, 11)]
    sync(tmp_path, server.uri)
    assert run_of(tmp_path, server).info.status == "FINISHED"
    assert live._client.get_run(double.info.run_id).info.lifecycle_stage == "deleted"
    live._client.download_artifacts(run.info.run_id, "config.yaml", str(tmp_path))


def test_a_run_begun_from_scratch_ends_the_one_that_was_there(server, tmp_path):
    """It was killed with its sender before its first checkpoint: nobody else would end it."""
    from mlflow.tracking import MlflowClient

    trackers = []
    for seed in (1, 2):
        lines = JsonlTracker(tmp_path, lambda step: step)
        lines.start({})
        config = run_config(tmp_path, server.uri, train__seed=seed)
        write_config(config, tmp_path / "config.yaml")
        trackers.append(MLflowTracker(config, tmp_path))
        trackers[-1].record_start({}, None)
        lines.log(1, {"train/loss": float(seed)})
        if seed == 1:
            late = Delivery(tmp_path, server.uri)
            late.deliver()
            lines.log(2, {"train/loss": 1.0})
            old = run_of(tmp_path, server).info
            assert old.status == "RUNNING"
            lines._file.close()  # as it is when the process is gone
    lines.finish("FINISHED")
    Journal(tmp_path).append("finish", status="FINISHED", attempt=trackers[-1].attempt)
    assert Sender(Delivery(tmp_path, server.uri), trackers[-1].attempt, 1.0).run(lambda: None) == 0
    client = MlflowClient(server.uri)
    assert run_of(tmp_path, server).info.run_id != old.run_id
    late.journal.save_state(server.uri, late._state)  # as its sender does when it comes late
    assert late.deliver() is False and Journal(tmp_path).state(server.uri) == {}
    sync(tmp_path, server.uri)
    assert client.get_run(old.run_id).info.status == "FAILED"
    assert len(client.get_metric_history(old.run_id, "train/loss")) == 2  # also what was waiting
    file = client.download_artifacts(old.run_id, "config.yaml", str(tmp_path))
    assert "seed: 1\n" in Path(file).read_text()  # config.yaml here is of the new run by now
