import json
import math
import time
import tracemalloc
from pathlib import Path

import pytest

from pltmoe.errors import DataError
from pltmoe.tracking import build_tracker, journal, jsonl
from pltmoe.tracking.jsonl import (
    JsonlTracker,
    decode_line,
    drop_after,
    encode_line,
    read_jobs,
    read_lines,
)
from tests.unit.tracking.runs import metrics_of, run_config


def write(run_dir: Path, steps: range, resume: int | None = None) -> None:
    tracker = JsonlTracker(run_dir, lambda step: 100 * step)
    tracker.start({}, resume_step=resume)
    for step in steps:
        tracker.log(step, {"train/loss": 1.0 / step})
    tracker.finish("FINISHED")


def steps_of(run_dir: Path) -> list[int]:
    return [line["step"] for line in read_lines(run_dir / "metrics.jsonl")]


def test_a_line_has_step_time_tokens_and_metrics(tmp_path):
    before = time.time()
    write(tmp_path, range(1, 3))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["tokens"] for line in lines] == [100, 200]
    assert lines[1]["train/loss"] == 0.5
    assert before - 1 <= lines[0]["time"] <= time.time() + 1
    assert list(lines[0])[:3] == ["step", "time", "tokens"]


def test_each_line_is_on_disk_before_the_next(tmp_path):
    tracker = JsonlTracker(tmp_path, lambda step: step)
    tracker.start({})
    tracker.log(1, {"train/loss": 1.0})
    assert steps_of(tmp_path) == [1]  # not closed, not finished
    tracker.finish("FINISHED")


def test_values_that_are_not_finite_are_strict_json_and_come_back():
    text = encode_line({"step": 1, "a": math.nan, "b": math.inf, "c": -math.inf})

    def no_constants(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    json.loads(text, parse_constant=no_constants)
    values = decode_line(text)
    assert math.isnan(values["a"]) and values["b"] == math.inf and values["c"] == -math.inf


def test_lines_share_the_names_of_their_metrics():
    """A report holds all lines; names were half of the memory."""
    first, second = (decode_line(encode_line({"step": n, "train/loss": 1.0})) for n in (1, 2))
    assert all(a is b for a, b in zip(first, second, strict=True))


def test_resume_cuts_the_steps_that_come_again(tmp_path, caplog):
    write(tmp_path, range(1, 13))
    with caplog.at_level("INFO"):
        write(tmp_path, range(9, 13), resume=8)
    assert steps_of(tmp_path) == list(range(1, 13))
    assert "cut 4 lines after step 8" in caplog.text
    assert not list(tmp_path.glob("*.new"))


def test_a_cut_neither_holds_the_file_in_memory_nor_decodes_it(tmp_path, monkeypatch):
    """A million lines of 3 kB were 3 GB of the host's memory and 36 s at each resume."""
    lines = [encode_line({"step": step, "text": 10**1000}) for step in range(1, 2001)]
    monkeypatch.setattr(jsonl, "decode_line", None)
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    tracemalloc.start()
    assert drop_after(tmp_path / "metrics.jsonl", 1990) == 10
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(lines[:1990])
    assert peak_bytes < 1e6


def test_resume_cuts_a_torn_line(tmp_path):
    write(tmp_path, range(1, 4))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "train/lo')
    assert steps_of(tmp_path) == [1, 2, 3]
    write(tmp_path, range(4, 6), resume=3)
    assert steps_of(tmp_path) == [1, 2, 3, 4, 5]


def test_a_full_disk_is_an_error_of_ours_and_so_is_a_file_that_cannot_be_opened(tmp_path, caplog):
    tracker = JsonlTracker(tmp_path / "run", lambda step: step)
    tracker.start({})
    tracker._file.close()
    tracker._file = open("/dev/full", "a")
    with pytest.raises(DataError, match=r"metrics.jsonl: cannot be written \(No space left on dev"):
        tracker.log(1, {"train/loss": 1.0})
    tracker.finish("FAILED")  # does not hide that error
    assert "the end of this job (FAILED) is not recorded" in caplog.text
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(DataError, match=r"metrics.jsonl: cannot be written \(Is a directory"):
        JsonlTracker(tmp_path, lambda step: step).start({}, resume_step=8)


def test_a_failed_cut_leaves_the_file_whole(tmp_path, monkeypatch):
    write(tmp_path, range(1, 6))
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def no_space(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", no_space)
    with pytest.raises(OSError, match="no space"):
        drop_after(tmp_path / "metrics.jsonl", 2)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_starting_from_scratch_moves_the_old_records_away(tmp_path):
    write(tmp_path, range(1, 4))
    (tmp_path / "mlflow").mkdir()
    write(tmp_path, range(1, 3))
    assert steps_of(tmp_path) == [1, 2]
    (previous,) = (tmp_path / "previous").iterdir()
    assert steps_of(previous) == [1, 2, 3]
    assert (previous / "mlflow").is_dir()


def test_logging_a_step_costs_less_than_a_millisecond(tmp_path):
    """A line of 100 metrics; the bound is loose enough for a busy machine (the median counts)."""
    config = run_config(tmp_path, model__num_loops=2, model__num_layers=48)
    tracker = build_tracker(config, tmp_path, lambda step: step)
    tracker.start({})
    metrics = metrics_of(1, config)
    assert len(metrics) == 100
    costs = []
    for step in range(200):
        began = time.perf_counter()
        tracker.log(step, metrics)
        costs.append(time.perf_counter() - began)
    tracker.finish("FINISHED")
    assert sorted(costs)[100] < 1e-3


def test_run_json_tells_where_each_job_ran_and_how_it_ended(tmp_path):
    tracker = JsonlTracker(tmp_path, lambda step: step)
    tracker.start({"device": "CPU (2 cores)"})
    assert read_jobs(tmp_path)[-1]["status"] == "RUNNING"
    tracker.finish("KILLED")
    write(tmp_path, range(6, 8), resume=5)
    first, second = read_jobs(tmp_path)
    assert first["tags"] == {"device": "CPU (2 cores)"} and first["status"] == "KILLED"
    assert second["resume_step"] == 5 and second["status"] == "FINISHED"


def test_a_job_with_a_clock_behind_that_of_a_killed_one_counts_on(tmp_path, monkeypatch, caplog):
    killed = JsonlTracker(tmp_path, lambda step: step)
    killed.start({})
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 30)
    for step in (1, 2):
        killed.log(step, {"train/loss": 1.0})
    killed._file.close()
    monkeypatch.setattr(time, "time", lambda: now - 30)
    write(tmp_path, range(2, 4), resume=1)
    times = [line["time"] for line in read_lines(tmp_path / "metrics.jsonl")]
    assert len(times) == 3 and times == sorted(times) and times[-1] >= times[0] > now
    assert "clock is 60.0 s behind" in caplog.text


def test_a_clock_that_is_set_back_does_not_take_time_back(tmp_path, monkeypatch):
    now = time.time()
    clock = iter([now + 9, now + 9, now + 1, now + 2, now + 3, now + 30, now + 40])
    monkeypatch.setattr(time, "time", lambda: next(clock))
    write(tmp_path, range(1, 5))
    times = [line["time"] - now for line in read_lines(tmp_path / "metrics.jsonl")]
    assert times == pytest.approx([9, 9, 10, 11], abs=0.002)


@pytest.mark.parametrize("left", [b"", b"\xff\0", b"[]"])
def test_what_a_lost_machine_left_does_not_end_the_next_job(tmp_path, caplog, left):
    write(tmp_path, range(1, 3))
    (tmp_path / "run.json").write_bytes(left)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(left)
    write(tmp_path, range(3, 5), resume=2)
    assert steps_of(tmp_path) == [1, 2, 3, 4]
    assert [job["resume_step"] for job in read_jobs(tmp_path)] == [2]
    assert "run.json: damaged; what it said of earlier jobs is lost" in caplog.text


def test_events_are_decoded_again_only_when_there_are_new_ones(tmp_path, monkeypatch):
    """Senders ask several times per batch; 500 starts are 2 MB of JSON."""
    decoded, decode = [], journal._decode
    monkeypatch.setattr(journal, "_decode", lambda text: decoded.append(text) or decode(text))
    mine, other = journal.Journal(tmp_path), journal.Journal(tmp_path)
    assert mine.events() == []
    other.append("start", attempt="a")
    assert [mine.last_start()["attempt"] for _ in range(5)] == ["a"] * 5
    assert len(decoded) == 1
    mine.events().clear()
    other.append("start", attempt="b")
    assert [event["attempt"] for event in mine.events()] == ["a", "b"]
