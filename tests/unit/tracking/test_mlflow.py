"""The training side alone: what is written down for MLflow, and what is refused."""

import errno
import subprocess

import pytest

from pltmoe.config import config_to_dict, without_password
from pltmoe.errors import ConfigError
from pltmoe.tracking.journal import Journal, end_of_last_start
from pltmoe.tracking.mlflow import MLflowTracker, flatten, how_to_look
from pltmoe.tracking.store import artifact_location, one_line, run_link, usable_uri
from tests.unit.tracking.runs import run_config


@pytest.mark.parametrize("uri", ["mlruns", "file:///tmp/mlruns", "/tmp/mlruns", "ftp://host/x"])
def test_a_uri_mlflow_cannot_use_is_refused(uri, tmp_path):
    with pytest.raises(ConfigError, match=r"tracking\.mlflow_uri .*sqlite:////ABSOLUTE"):
        MLflowTracker(run_config(tmp_path, uri), tmp_path)


def test_sqlite_without_a_file_is_refused():
    with pytest.raises(ConfigError, match="names no file"):
        usable_uri("sqlite://")


def test_a_store_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be made"):
        usable_uri(f"sqlite:///{tmp_path}/file/below/mlflow.db")


def test_sqlite_gets_its_directory_and_its_artefacts_stay_beside_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    uri = usable_uri("sqlite:///new/mlflow.db")
    assert uri == f"sqlite:///{tmp_path}/new/mlflow.db"
    assert (tmp_path / "new").is_dir()
    assert artifact_location(uri, "a b") == f"file://{tmp_path}/new/mlflow_artifacts/a%20b"
    assert artifact_location("http://host", "a") is None


def test_parameters_are_the_whole_config_with_dotted_names(tmp_path):
    config = run_config(tmp_path, "http://user:secret@host:1")
    flat = flatten(config_to_dict(config))
    assert flat["model.num_layers"] == "3"
    assert flat["model.cross_loop_shift"] == "false"
    assert flat["model.ffn_hidden_size"] == "null"
    assert flat["data.train.0.path"] == "corpus"
    assert flat["data.split"] == "[98.0, 2.0, 0.0]"
    assert flat["tracking.mlflow_uri"] == "http://***@host:1"


def test_no_password_is_written_down(tmp_path):
    config = run_config(tmp_path, "http://user:secret@host:1")
    MLflowTracker(config, tmp_path).record_start({}, resume_step=None)
    assert "secret" not in Journal(tmp_path).events_path.read_text()
    assert without_password("sqlite:////a/b.db") == "sqlite:////a/b.db"
    assert without_password("http://user:p@ss@host:1/a@b") == "http://***@host:1/a@b"
    assert without_password("http://host:1/a@b") == "http://host:1/a@b"
    assert without_password("postgresql://me:p/q+r@db:1/a") == "postgresql://***@db:1/a"
    stored = without_password("mysql://db/a?user=me&password=x")
    assert stored == "mysql://db/a?user=me&password=***"
    with pytest.raises(ConfigError, match="the password is not stored"):
        usable_uri(stored)
    with pytest.raises(ConfigError, match="expected http") as seen:
        usable_uri("postgres://me:secret@db/a")
    assert "secret" not in str(seen.value)


def test_a_long_error_keeps_its_reason():
    """Of a request that a proxy did not answer, the proxy was cut off."""
    text = one_line(OSError(f"HTTPConnectionPool(host): {300 * 'x'} Unable to connect to proxy"))
    assert text.startswith("HTTPConnectionPool") and text.endswith("connect to proxy")
    assert len(text) <= 310


def test_tags_say_model_and_resume_and_users_win(tmp_path):
    config = run_config(tmp_path, "http://host", tracking__tags={"team": "a", "layout": "mine"})
    tracker = MLflowTracker(config, tmp_path)
    tracker.record_start({"commit": "abc", "layout": "EP2"}, resume_step=40)
    tags = Journal(tmp_path).last_start()["tags"]
    expected = {"model": "small", "resumed": "true", "resumed_from_step": "40", "commit": "abc"}
    expected |= {"team": "a", "layout": "mine", "mlflow.source.git.commit": "abc"}
    assert expected.items() <= tags.items()


def test_a_resumed_job_keeps_the_key_of_the_run(tmp_path):
    config = run_config(tmp_path, "http://host")
    MLflowTracker(config, tmp_path).record_start({}, resume_step=None)
    MLflowTracker(config, tmp_path).record_start({}, resume_step=5)
    first, second = Journal(tmp_path).events()
    assert first["run_key"] == second["run_key"]
    assert first["attempt"] != second["attempt"]


def test_the_end_of_an_earlier_attempt_does_not_end_the_next():
    """Its sender notices a kill -9 at about the time when the next job begins."""
    starts = [{"event": "start", "attempt": "a"}, {"event": "start", "attempt": "b"}]
    late = {"event": "finish", "attempt": "a", "status": "FAILED"}
    assert end_of_last_start([*starts, late]) is None
    own = {"event": "finish", "attempt": "b", "status": "FINISHED"}
    assert end_of_last_start([*starts, own, late]) is own


def test_a_torn_event_does_not_spoil_those_after_it(tmp_path):
    """A machine that was lost, or a disk that was full, in the middle of a line."""
    journal = Journal(tmp_path)
    journal.append("start", attempt="a")
    with journal.events_path.open("a") as file:
        file.write('{"event": "finish", "att')
    assert [event["event"] for event in journal.events()] == ["start"]
    journal.append("start", attempt="b")
    journal.append("finish", attempt="b")
    assert [(e["event"], e["attempt"]) for e in journal.events()] == [
        ("start", "a"), ("start", "b"), ("finish", "b"),
    ]  # fmt: skip
    journal.save_state("http://host", {"run_id": "abc"})
    assert journal.state("http://host") == {"run_id": "abc"}
    (journal.folder / "state.json").write_text('{"http://host": {"run')
    assert journal.state("http://host") == {}
    journal.save_state("http://host", {"run_id": "abc"})
    assert journal.state("http://host") == {"run_id": "abc"}


def test_a_full_disk_does_not_end_training(tmp_path, monkeypatch, caplog):
    """Nor one process too many. What is missing can be sent later: metrics.jsonl has it."""

    def full(*args: object, **fields: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "events.jsonl")

    def warned() -> bool:
        text, _ = caplog.text, caplog.clear()
        return "No space left on device" in text and f"sync_mlflow.py '{run_dir}'\n" in text

    run_dir = tmp_path / "a run"  # the command can be pasted
    config = run_config(run_dir, "http://127.0.0.1:9")
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", full)
        tracker = MLflowTracker(config, run_dir)
        tracker.start({})
        assert warned()
        tracker.artifact(tmp_path)
        tracker.log(1, {})
        tracker.finish("FINISHED")
        assert warned()
    monkeypatch.setattr(subprocess, "Popen", full)
    tracker = MLflowTracker(config, run_dir)
    tracker.start({})
    assert warned()
    monkeypatch.setattr(Journal, "append", full)
    tracker.finish("FINISHED")
    assert warned()


def test_links_open_the_training_view():
    link = run_link("http://host:1/", "2", "abc")
    assert link == "http://host:1/#/experiments/2/runs/abc?workflowType=machine_learning"


def test_how_to_look_at_a_local_store(tmp_path):
    uri = f"sqlite:///{tmp_path}/of mine/mlflow.db"
    assert how_to_look(tmp_path) is None
    MLflowTracker(run_config(tmp_path, uri), tmp_path).record_start({}, None)
    assert how_to_look(tmp_path) is None  # not sent yet
    Journal(tmp_path).save_state(uri, {"run_id": "abc", "experiment_id": "3"})
    command, page = how_to_look(tmp_path).split("   then ")
    assert command == f"MLFLOW_DISABLE_TELEMETRY=true mlflow ui --backend-store-uri '{uri}'"
    assert page == "http://127.0.0.1:5000/#/experiments/3?workflowType=machine_learning"
