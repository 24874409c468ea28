"""Reports of runs that were really logged: what the files say is what metrics.jsonl says."""

import csv
import json
import math
import os
import re
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.image import imread

from pltmoe.config import write_config
from pltmoe.config.counts import count_parameters, flops_per_token, kv_cache_bytes
from pltmoe.errors import DataError
from pltmoe.reports import numbers, runs
from pltmoe.reports.done import what_was_done
from pltmoe.reports.glance import Extras, final_loss, in_a_line
from pltmoe.reports.plots import Bars, _running_mean, plot_costs
from pltmoe.reports.runs import Run, read_run
from pltmoe.reports.summary import read_decode, read_generated, tell_apart, write_report
from tests.repository import run_python, run_tool
from tests.unit.reports.logged_runs import DECODE, cells, logged_run
from tests.unit.tracking.runs import LOOPED, PLT, run_config


@pytest.fixture(scope="module")
def run_dirs(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    kinds = {"vanilla": {}, "loop2": LOOPED, "plt2": PLT}
    return [
        logged_run(folder, name, **{f"model__{k}": v for k, v in changes.items()})
        for name, changes in kinds.items()
    ]


@pytest.fixture(scope="module")
def report(run_dirs, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    runs = [read_run(path) for path in run_dirs]
    samples = [{"prompt": "def f(x):", "text": "\n    return x\n"}]
    return write_report(runs, folder, "Three runs", Extras(DECODE, samples))


def test_long_curves_are_smoothed_without_a_bend_at_their_ends():
    flat = _running_mean(np.full(300, 2.5), 6)
    np.testing.assert_allclose(flat, 2.5, rtol=1e-12)
    rising = _running_mean(np.arange(300.0), 5)
    np.testing.assert_allclose(rising[2:-2], np.arange(2.0, 298.0), rtol=1e-12)
    assert rising[0] == pytest.approx((0 + 1 + 2) / 3)


def test_one_line_says_losses_and_ratios_to_the_baseline(run_dirs):
    runs = [read_run(path) for path in run_dirs]
    said = in_a_line(runs, Extras(DECODE)).removeprefix("Validation loss: ").split("; ")
    for run, text in zip(runs, said, strict=True):
        assert text.startswith(f"{run.name} {run.series('valid/loss')[-1].value:.3f}")
    assert "KV cache" not in said[0] and said[1].endswith(", KV cache 2.00x")  # not decoded
    assert said[2].endswith("x, decoding 2.00x")  # 16.25 ms over 8.134
    (run,) = [r for r in runs if r.name == "plt2"]
    silent = [{k: v for k, v in line.items() if k != "valid/loss"} for line in run.lines]
    assert "plt2 not validated, KV" in in_a_line([runs[0], replace(run, lines=silent)], Extras({}))


def test_a_step_skipped_as_a_spike_is_no_training_loss(tmp_path):
    """It has a finite loss and a line of its own, between those of the interval."""
    losses = {10: 3.0, 20: 3.0, 23: 9.0, 24: 12.0, 30: 3.0, 40: 3.0, 50: 15.0, 60: 3.0}
    skipped = {10: 1, 20: 1, 23: 2, 24: 3, 30: 3, 40: 3, 50: 4, 60: 4}
    lines = [{"step": 55, "tokens": 55, "perf/save_seconds": 1.0}]  # a line without a loss
    for step, loss in losses.items():
        counts = {"train/loss": loss, "train/skipped_steps": float(skipped[step])}
        lines.append({"step": step, "tokens": step, "optim/grad_norm": 1.0, **counts})
    run = Run(run_config(tmp_path), lines, "here")
    assert [p.step for p in run.series("train/loss")] == [10, 20, 30, 40, 60]
    assert final_loss(run) == 3.0
    assert len(run.series("optim/grad_norm")) == len(losses)
    assert run.has("optim/grad_norm") and not run.has("moe/load_imbalance/loop_1")
    lines += [{"step": 1, "tokens": 1, "train/loss": 99.0, "train/skipped_steps": 1.0}]
    assert [p.step for p in run.series("train/loss")] == [10, 20, 30, 40, 60]  # the first as well


def test_tokens_of_rows_that_did_not_log_them():
    """The batch was twice as large since step 50; 100 tokens a step are of the newest setting."""
    logged = {10: 500.0, 40: 2000.0, 60: 3500.0}
    rows = {step: {"step": step} for step in (0, 5, 25, 40, 60, 65)}
    for step, tokens in logged.items():
        rows[step] = {"step": step, "train/tokens": tokens}
    runs._add_tokens(rows, 100)
    tokens = {step: row["tokens"] for step, row in sorted(rows.items())}
    assert tokens == {0: 0, 5: 250, 10: 500, 25: 1250, 40: 2000, 60: 3500, 65: 4000}
    rows = {7: {"step": 7}}
    runs._add_tokens(rows, 100)
    assert rows[7]["tokens"] == 700


def test_what_is_no_number_stands_in_its_row_as_text(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    said, text = [], Axes.text
    monkeypatch.setattr(Axes, "text", lambda s, *a, **k: said.append(a[1:]) or text(s, *a, **k))
    values = [3.0, math.inf, None, math.nan]
    charts = [Bars("from zero", values), Bars("dots", values, from_zero=False)]
    plot_costs(["a", "b", "c", "d"], charts, tmp_path / "cost.png")
    assert said == 2 * [(0, "3.000"), (1, "inf"), (2, "not run"), (3, "nan")]
    plot_costs(["a"], [Bars("x", [math.nan]), Bars("y", [-math.inf])], tmp_path / "cost.png")
    assert imread(tmp_path / "cost.png").shape[1] > 500


def test_a_skipped_step_does_not_spoil_the_final_loss():
    values = [9.0, 5.0, 4.0, float("nan"), 3.0, 2.0, 1.0]
    series = [SimpleNamespace(value=value) for value in values]
    assert final_loss(SimpleNamespace(series=lambda name: series)) == 3.0
    assert math.isnan(final_loss(SimpleNamespace(series=lambda name: series[3:4])))


def raw_lines(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def csv_rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_the_report_says_whether_loops_were_one_pass(run_dirs):
    runs = [read_run(path) for path in run_dirs]
    for passes, said in ((1, "were one forward pass in plt2."), (2, "one after another in plt2.")):
        extras = Extras(decode={"plt2": DECODE["plt2"] | {"passes": passes}})
        assert said in what_was_done(runs, extras)


def test_the_report_says_how_many_seeds_there_are(run_dirs, tmp_path):
    runs = [read_run(run_dirs[0]), read_run(logged_run(tmp_path, "b", train__seed=7))]
    assert "- One run each (seed 1234): a difference" in what_was_done(runs[:1], Extras())
    assert "- Seeds 7, 1234: a difference as small" in what_was_done(runs, Extras())


def test_the_results_are_the_numbers_of_the_jsonl(report, run_dirs):
    for column, run_dir in enumerate(run_dirs):
        lines = raw_lines(run_dir)
        train = fmean(line["train/loss"] for line in lines[-5:])
        assert cells(report, "training loss")[column] == f"{train:.4f}"
        valid = [line for line in lines if "valid/loss" in line][-1]
        expected = f"**{valid['valid/loss']:.4f}** ({valid['step']})"
        assert cells(report, "**validation loss**")[column] == expected
        assert cells(report, "training tokens/s per device")[column] == "5,110"


def test_the_results_are_the_numbers_of_the_configuration(report, run_dirs):
    models = [read_run(path).config.model for path in run_dirs]
    parameters = [numbers.count(count_parameters(m).total) for m in models]
    assert cells(report, "parameters") == [*parameters, "60 B → 40 B"]
    assert cells(report, "active")[0] == numbers.count(count_parameters(models[0]).active)
    work = [flops_per_token(m, 128) for m in models]
    flops = [f"{numbers.flops(f)} ({f / work[0]:.2f}x)" for f in work]
    assert cells(report, "training compute per token")[:3] == flops
    sizes = [kv_cache_bytes(m, 128) for m in models]
    shown = [f"{numbers.size_in_bytes(s)} ({s / sizes[0]:.2f}x)" for s in sizes]
    assert cells(report, "KV cache per sequence of 128 tokens") == [*shown, "about 0.67x"]


def test_measurements_stand_beside_the_papers(report):
    decode = ["8.13 (1.00x)", "not run", "16.25 (2.00x)", "about 0.70x"]
    assert cells(report, "decode ms per token") == decode
    measured = cells(report, "KV cache per sequence (measured)")
    assert measured == ["not run", "not run", "not run", "about 0.67x"]
    assert cells(report, "average score") == [*["not run"] * 3, "62.1 → 62.6 (10 tasks)"]
    assert cells(report, "MFU (median)")[:3] == ["not known"] * 3


def test_differences_are_the_differences_and_nothing_else(report):
    text = report.read_text().partition("## Where the configurations differ")[2]
    names = re.findall(r"^\| `([\w.]+)`", text.partition("\n## ")[0], flags=re.MULTILINE)
    expected = {f"model.{key}" for key in PLT}
    assert set(names) == expected
    assert cells(report, "`model.num_loops`") == ["1", "2", "2"]


def test_it_says_what_was_run_on_what_and_what_was_not(report):
    text = report.read_text()
    assert "200 of 200" in text and "FINISHED" in text and "EP2 x DP2" in text
    assert "No GPU was used" in text
    assert "Every run saw 204,800 tokens." in text
    assert "seed 1234" in text
    assert "No benchmark of knowledge" in text
    assert "def f(x):\n    return x" in text


def test_csvs_hold_what_was_logged(report, run_dirs):
    rows = csv_rows(report.parent / "loss.csv")
    for run_dir in run_dirs:
        run = read_run(run_dir)
        for kind in ("train", "valid"):
            got = [
                (int(r["step"]), int(r["tokens"]), float(r["loss"]))
                for r in rows
                if r["run"] == run.name and r["kind"] == kind
            ]
            lines = [m for m in raw_lines(run_dir) if f"{kind}/loss" in m]
            assert got == [(m["step"], m["tokens"], m[f"{kind}/loss"]) for m in lines]
    last = [row for row in rows if row["run"] == "plt2"][-1]
    flops = flops_per_token(read_run(run_dirs[2]).config.model, 128)
    assert float(last["flops"]) == pytest.approx(int(last["tokens"]) * flops)

    heat = csv_rows(report.parent / "loops.csv")
    at = {"run": "plt2", "metric": "plt/gate_mean", "loop": "2", "layer": "3", "step": "200"}
    (found,) = [row for row in heat if at.items() <= row.items()]
    assert float(found["value"]) == raw_lines(run_dirs[2])[-1]["plt/gate_mean/loop_2/layer_03"]
    costs = csv_rows(report.parent / "cost.csv")
    assert [row["Decoding (ms per token)"] for row in costs] == ["8.134", "", "16.25"]


def test_pictures_show_the_rows_of_their_csv(run_dirs, tmp_path, monkeypatch):
    """The lines and cells that matplotlib gets are the logged values."""
    from matplotlib.axes import Axes

    from pltmoe.reports import heat_maps, plots

    drawn, grids = [], []
    plot, pcolormesh = Axes.plot, Axes.pcolormesh
    monkeypatch.setattr(Axes, "plot", lambda s, *a, **k: drawn.append(a) or plot(s, *a, **k))
    monkeypatch.setattr(
        Axes, "pcolormesh", lambda s, *a, **k: grids.append(a[2]) or pcolormesh(s, *a, **k)
    )
    runs = [read_run(path) for path in run_dirs]
    plots.plot_losses(runs, tmp_path / "loss.png", "t")
    values = [p.value for p in runs[2].series("train/loss")]
    tokens = [p.tokens / 1e3 for p in runs[2].series("train/loss")]
    assert any(list(a[1]) == values and list(a[0]) == pytest.approx(tokens) for a in drawn)
    heat_maps.plot_heat_maps(runs, tmp_path / "loops.png")
    gates = runs[2].by_loop_and_layer("plt/gate_mean")
    expected = [[p.value for p in gates[2, layer]] for layer in (1, 2, 3)]
    assert any(grid.tolist() == expected for grid in grids)


def test_heat_maps_of_many_runs_wrap(run_dirs, tmp_path):
    from pltmoe.reports import heat_maps

    runs = [read_run(path) for path in run_dirs]
    few, many = tmp_path / "few.png", tmp_path / "many.png"
    heat_maps.plot_heat_maps([runs[2]] * 6, few)
    heat_maps.plot_heat_maps([runs[2]] * 7, many)
    (height, width, _), (tall, same, _) = imread(few).shape, imread(many).shape
    assert same == width
    assert tall == 2 * height


def test_pictures_are_pictures(report):
    for name in ("loss", "loops", "cost"):
        image = imread(report.parent / f"{name}.png")
        assert image.shape[1] > 1000
        assert image[..., :3].std() > 0.05  # something is drawn
    assert not list(report.parent.glob("*.new"))


def test_a_run_that_never_validated_or_looped_still_has_a_report(tmp_path):
    run_dir = tmp_path / os.fsdecode(b"caf\xe9")
    run_dir.mkdir()
    write_config(run_config(tmp_path, name="bare"), run_dir / "config.yaml")
    (run_dir / "metrics.jsonl").write_text(
        '{"step": 1, "time": 1.0, "tokens": 1024, "train/loss": "NaN"}\n'
        '{"step": 2, "time": 2.0, "tokens": 2048, "train/loss": 3.0}\n'
    )
    extras = Extras(generated=[{"prompt": "half a pair: ", "text": "\ud800"}])
    path = write_report([read_run(run_dir)], tmp_path / "report", "Bare", extras)
    text = path.read_text()
    assert r"half a pair: \ud800" in text and r"/caf\udce9`" in text
    assert cells(path, "**validation loss**") == ["not run", "not stated"]
    assert "Not validated: bare." in text
    assert "**Not finished:** bare (2 of 1,000 steps)." in text
    assert "an unknown device" in text and "Decoding was not measured:" in text
    assert not (tmp_path / "report" / "loops.png").exists()


def test_errors_say_what_is_wrong(run_dirs, tmp_path):
    with pytest.raises(DataError, match=r"no metrics\.jsonl here"):
        read_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(DataError, match=r"no config\.yaml here"):
        read_run(tmp_path)
    write_config(run_config(tmp_path), tmp_path / "config.yaml")
    with pytest.raises(DataError, match="no step was logged yet"):
        read_run(tmp_path)
    run = read_run(run_dirs[0])
    with pytest.raises(DataError, match="have the same name 'vanilla'"):
        write_report(tell_apart([run, run]), tmp_path / "r", "t", Extras())
    with pytest.raises(DataError, match="decode times of \\['other'\\], but the runs are"):
        write_report([run], tmp_path / "r", "t", Extras({"other": {"ms_per_token": 1.0}}))
    empty = Run(run.config, [{"step": 1, "tokens": 1, "time": 1.0}], "here")
    with pytest.raises(DataError, match="no train/loss was logged"):
        write_report([empty], tmp_path / "r", "t", Extras())
    assert not (tmp_path / "r").exists()


def test_runs_of_one_name_get_the_ends_of_their_paths(run_dirs, tmp_path):
    """Seeds and learning rates are runs of one preset."""
    vanilla, other = (read_run(path) for path in run_dirs[:2])
    sources = ("a/x/run", "b/x/run", "c/y/run")
    told = tell_apart([*(replace(vanilla, source=source) for source in sources), other])
    assert [run.name for run in told] == ["a/x/run", "b/x/run", "c/y/run", "loop2"]
    told = tell_apart([replace(vanilla, source="w/loop2"), replace(vanilla, source="w/b"), other])
    assert [run.name for run in told] == ["w/loop2", "w/b", "loop2"], "no name of another run"
    text = write_report(told[:2], tmp_path, "t", Extras()).read_text()
    assert "| w/loop2 |" in text and "Nowhere but in their names." in text


def test_bad_files_of_other_tools_are_named(tmp_path):
    path = tmp_path / "x.json"
    with pytest.raises(DataError, match="cannot be read"):
        read_decode(path)
    path.write_text("{")
    with pytest.raises(DataError, match="not valid JSON"):
        read_decode(path)
    path.write_text("[]")
    with pytest.raises(DataError, match="run name"):
        read_decode(path)
    path.write_text('{"a": {}}')
    with pytest.raises(DataError, match="'a' has no number ms_per_token"):
        read_decode(path)
    with pytest.raises(DataError, match="not a list of samples"):
        read_generated(path)


def test_the_tool(run_dirs, tmp_path):
    decode = tmp_path / "decode.json"
    decode.write_text(json.dumps(DECODE))
    bare = {"PATH": "", "HOME": str(tmp_path)}
    words = ("--output", tmp_path, "--decode", decode, "--title", "By the tool")
    done = run_python("tools/compare_runs.py", *run_dirs, *words, **bare)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "report.md").read_text().startswith("# By the tool\n")
    failed = run_tool("compare_runs.py", tmp_path, "--output", tmp_path / "x")
    assert failed.returncode == 1
    assert failed.stderr.startswith("error: ") and "Traceback" not in failed.stderr


@pytest.mark.parametrize(
    ("got", "expected"),
    [
        (numbers.count(1228800), "1.23 M"),
        (numbers.count(39.19e9), "39.2 B"),
        (numbers.count(512), "512"),
        (numbers.flops(2.998e7), "30.0 MFLOP"),
        (numbers.size_in_bytes(131072), "128 KiB"),
        (numbers.size_in_bytes(100), "100 B"),
        (numbers.significant(12345.6), "12,300"),
        (numbers.significant(0.01234), "0.0123"),
        (numbers.significant(float("nan")), "nan"),
        (numbers.scale_of(2.5e6), (1e6, "M")),
        (numbers.scale_of(0.5), (1.0, "")),
    ],
)
def test_numbers_read_well(got, expected):
    assert got == expected
