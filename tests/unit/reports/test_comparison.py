"""The tool and a real MLflow store: one experiment shows the runs, the table and the report."""

import json
import os
from pathlib import Path

import pytest

from pltmoe.reports.runs import read_run
from pltmoe.tracking.comparison import log_comparison
from tests.repository import run_tool
from tests.unit.reports.logged_runs import DECODE, cells, logged_run
from tests.unit.tracking.runs import PLT

CAFE = os.fsdecode(b"caf\xe9")  # no UTF-8


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two logged runs, a store that does not exist yet."""
    folder = tmp_path_factory.mktemp("comparison")
    logged_run(folder, "vanilla")
    logged_run(folder, "plt2", **{f"model__{key}": value for key, value in PLT.items()})
    decode = {name: DECODE[name] for name in ("vanilla", "plt2")}
    (folder / "decode.json").write_text(json.dumps(decode))
    return folder


def compare(*arguments: object, code: int = 0) -> str:
    done = run_tool("compare_runs.py", *arguments)
    assert done.returncode == code, done.stderr
    return done.stderr if code else done.stdout


@pytest.fixture
def uri(folder) -> str:
    return f"sqlite:///{folder}/mlflow.db"


def test_one_experiment_shows_runs_table_and_report(folder, uri, tmp_path, monkeypatch):
    from mlflow.tracking import MlflowClient

    runs = [folder / "vanilla", folder / "plt2"]
    decode = ["--decode", folder / "decode.json", "--mlflow-uri", uri]
    for _ in range(2):  # the second time renews, and makes nothing new
        said = compare(*runs, *decode, "--output", tmp_path / "report", "--title", CAFE)
    assert f"MLflow: MLFLOW_DISABLE_TELEMETRY=true mlflow ui --backend-store-uri {uri}" in said
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("tests")
    found = {r.info.run_name: r for r in client.search_runs([experiment.experiment_id])}
    assert sorted(found) == ["comparison", "plt2", "vanilla"]
    assert len(client.search_runs([experiment.experiment_id])) == 3
    assert {run.info.status for run in found.values()} == {"FINISHED"}

    note = experiment.tags["mlflow.note.content"]
    assert note.startswith("Validation loss: vanilla ")  # all that is shown when folded
    assert "| decode ms per token (measured)" in note and "about 0.70x" in note
    assert found["comparison"].data.tags["mlflow.note.content"] == note
    run_id = found["comparison"].info.run_id
    assert (tmp_path / "report/report.md").read_text().startswith("# caf\\udce9\n")
    files = {item.path for item in client.list_artifacts(run_id, "report")}
    written = {f"report/{path.name}" for path in (tmp_path / "report").iterdir()}
    assert files == written and "report/report.md" in files and "report/loss.png" in files

    tags = found["plt2"].data.tags
    assert (tags["variant"], tags["loops"]) == ("PLT-2", "2")
    assert tags["mlflow.note.content"].startswith("**PLT-2**: 2 x 3 layers, shift, shared KV")
    assert found["vanilla"].data.tags["variant"] == "vanilla"

    # What MLflow has gives the same table as the folders.
    ids = [f"mlflow:{found[name].info.run_id}" for name in ("vanilla", "plt2")]
    monkeypatch.setenv("PLTMOE_MLFLOW_URI", uri)
    compare(*ids, *decode[:2], "--output", tmp_path / "again")
    for label in ("**validation loss**", "training loss", "decode ms", "training compute per"):
        both = [cells(tmp_path / name / "report.md", label) for name in ("report", "again")]
        assert both[0] == both[1]
    assert read_run(runs[0]).last_step == 200


def test_a_server_that_is_away_leaves_the_report(folder, tmp_path):
    where = ["--mlflow-uri", "http://127.0.0.1:9", "--output", tmp_path / "report"]
    assert "the comparison could not be logged" in compare(folder / "vanilla", *where, code=1)
    assert (tmp_path / "report" / "report.md").exists()


def test_an_mlflow_run_needs_an_address(tmp_path):
    said = compare("mlflow:abc", "--output", tmp_path, code=1)
    assert "say where this run is with --mlflow-uri" in said


def test_a_description_too_long_for_mlflow_ends_at_a_line(uri):
    from mlflow.tracking import MlflowClient

    note = "\n".join(f"line {number} of many" for number in range(1000))
    log_comparison(uri, "long", ["a"], [], note)
    kept = MlflowClient(uri).get_experiment_by_name("long").tags["mlflow.note.content"]
    assert len(kept) <= 5000 and "More in the report" in kept.splitlines()[-1]
    assert kept.splitlines()[-3].endswith("of many")
