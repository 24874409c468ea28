"""gpu_check without a GPU: it refuses, remembers parts, and never claims what was not run."""

import importlib.util
import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from pltmoe.reports import gpu_parts, gpu_tables
from pltmoe.runtime import versions
from tests.repository import REPOSITORY, run_python
from tests.unit.reports.logged_runs import logged_rows

WHERE = {"device": "GPU", "versions": "v", "commit": "abc"}
Part = gpu_parts.Part


@pytest.fixture
def gpu_check() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_check", REPOSITORY / "tools/gpu_check.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def suite(
    gpu_check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., str]:
    """Call the tool with parts of a test's own, as if there were a GPU; returns the page."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "GPU")
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs/gpu_results.md"

    def call(*parts: Part, say: str = "", commit: str = "abc", **absent: str) -> str:
        monkeypatch.setattr(versions, "commit", lambda: commit)
        monkeypatch.setattr(gpu_check, "PARTS", parts)
        monkeypatch.setattr(gpu_check, "_absent", lambda: absent)
        paths = ["--work", str(tmp_path), "--page", str(page)]
        monkeypatch.setattr(sys, "argv", ["gpu_check", *paths, *say.split()])
        call.code = gpu_check.main()
        return page.read_text()

    return call


def noted(name: str, then: str = "true", **more: object) -> Part:
    """Return a part that adds its name to the file ``order``."""
    return Part(f"tests-{name}", name, (f"echo {name} >> $WORK/order; {then}",), **more)


def test_refuses_without_a_gpu() -> None:
    done = run_python("tools/gpu_check.py", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert done.stdout == (
        "error: gpu_check needs an NVIDIA GPU (torch.cuda.is_available() is false)\n"
    )


def not_run(page: str) -> list[str]:
    """Return what a page says that was not run."""
    return re.findall("^- (.*)", page.partition("\n## Not run\n")[2], re.MULTILINE)


def test_page_in_the_repository_is_what_the_tool_writes(
    gpu_check: ModuleType, tmp_path: Path
) -> None:
    page = (REPOSITORY / "docs/gpu_results.md").read_text()
    for part in gpu_parts.PARTS:
        assert re.search(rf"^(##|-) {re.escape(f'{part.name}: {part.what}')}", page, re.MULTILINE)
    assert len(not_run(gpu_check._page(tmp_path, {}))) == len(gpu_parts.PARTS)
    profiles = (REPOSITORY / "docs/profile.md").read_text()
    for title, _, _ in gpu_parts.PROFILES:
        assert re.search(rf"^(##|-) {re.escape(title)}$", profiles, re.MULTILINE)


def test_a_passed_part_is_not_run_again(suite: Callable[..., str], tmp_path: Path) -> None:
    part = noted("x", "echo '3 passed in 1.00s'")
    for say in ("", "", "--again"):
        page = suite(part, say=say)
    assert (tmp_path / "order").read_text() == "x\nx\n" and suite.code == 0
    assert "3 passed in 1.00s" in page
    for commit in ("new", "unknown", "unknown"):  # who knows what sources those were
        suite(part, commit=commit)
    assert (tmp_path / "order").read_text() == "x\n" * 5


def test_what_failed_is_tried_again_when_all_others_have_a_result(
    suite: Callable[..., str], tmp_path: Path
) -> None:
    """A call that ends early would never come to them."""
    parts = (noted("a", "false"), noted("b"), noted("c"))
    suite(*parts, say="--parts tests-a,tests-b")
    assert suite.code == 1
    suite(*parts)
    assert (tmp_path / "order").read_text().split() == ["a", "b", "c", "a"]
    suite(*parts, commit="new")
    assert (tmp_path / "order").read_text().split()[4:] == ["a", "b", "c"], "other sources"


def test_what_uses_data_comes_after_what_makes_it_also_when_that_failed(
    suite: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    maker = noted("maker", "test -e $WORK/mended && touch $WORK/data", makes=("data",))
    parts = (maker, noted("user", data_of="tests-maker"), noted("other"))
    page = suite(*parts)
    assert "tests-user: not run: tests-maker has not made data" in capsys.readouterr().out
    assert not_run(page) == ["tests-user: user"], "it did not fail"
    (tmp_path / "mended").touch()
    suite(*parts, noted("new"))
    order = (tmp_path / "order").read_text().split()
    assert order == ["maker", "other", "new", "maker", "user"]


def test_a_part_is_begun_only_with_the_time_that_it_takes(
    suite: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """If it was stopped all the same, it wants more the next time, and others have their turn."""
    parts = (noted("long", seconds=100), noted("slow", "sleep 30", seconds=2))
    page = suite(*parts, say="--minutes 0.05")
    assert (tmp_path / "order").read_text().split() == ["slow"]
    said = capsys.readouterr().out
    assert "no time left for tests-long (about 100 s); these are guesses" in said
    assert "tests-slow: stopped after" in said and len(not_run(page)) == 2
    suite(*parts, noted("short", seconds=0), say="--minutes 0.035")
    assert (tmp_path / "order").read_text().split() == ["slow", "short"]
    assert "tests-slow (about 3 s)" in capsys.readouterr().out


def test_a_part_that_hangs_takes_no_other_parts_time(
    suite: Callable[..., str], gpu_check: ModuleType, tmp_path: Path
) -> None:
    """It failed; the next time, after all others, it gets more."""
    slow = noted("slow", "sleep 30", seconds=1)
    page = suite(slow, noted("next", seconds=9), say="--minutes 1")
    assert "FAILED in 2." in page and "stopped after 2." in page
    assert (tmp_path / "order").read_text().split() == ["slow", "next"]
    wanted = gpu_check._wanted_s(slow, tmp_path, "abc")
    assert 2.2 <= wanted < 4
    gpu_check.LIMIT_S = 1
    assert "FAILED in 1." in suite(slow, say="--minutes 1")
    assert all(part.seconds <= 510 for part in gpu_parts.PARTS), "none would ever be begun"


def test_what_a_part_leaves_behind_or_prints_does_not_stop_the_suite(
    suite: Callable[..., str], tmp_path: Path
) -> None:
    """A process in a session of its own holds the output; bytes may be no text."""
    began = time.monotonic()
    odd = noted("odd", r"setsid sleep 15 & printf 'a\xffb\r3 passed in 1s\n'")
    page = suite(odd, noted("next"))
    assert time.monotonic() - began < 10
    assert "3 passed in 1s" in page and page.count("Passed in") == 2
    assert (tmp_path / "tests-odd.log").read_bytes() == b"a\xffb\r3 passed in 1s\n"


def test_files_of_older_sources_cost_their_text_alone(
    suite: Callable[..., str], tmp_path: Path
) -> None:
    logged_rows(tmp_path / "learn", {"row1": 3.0})
    for file in (tmp_path / "learn").glob("*/config.yaml"):
        file.write_text(file.read_text().replace("num_loops:", "number_of_loops:", 1))
    (tmp_path / "mfu-fine-bf16").mkdir()
    (tmp_path / "mfu-fine-bf16/mfu.json").write_text("{}")
    page = suite(noted("a"), noted("b"))
    assert "## Learning\n\nCannot say what was measured: ConfigError: " in page
    assert "## Targets\n\nCannot say what was measured: KeyError: " in page
    assert page.count("Passed in") == 2
    assert suite.code == 1, "the picture is not what it should be"


def test_what_needs_software_that_is_not_there_is_not_run(
    suite: Callable[..., str], tmp_path: Path
) -> None:
    engine, why = gpu_parts.TRANSFORMER_ENGINE, "Transformer Engine is not installed"
    part = noted("te", needs=engine)
    for _ in range(2):
        assert not_run(suite(part, **{engine: why})) == [f"tests-te: te ({why})"]
    assert not (tmp_path / "order").exists() and suite.code == 0
    assert "Passed in" in suite(part), "it is there now"
    assert "Passed in" in suite(part, **{engine: why}), "what was measured stays"
    needed = {part.name for part in gpu_parts.PARTS if part.needs == engine}
    mfu = {f"mfu-{model}-{name}" for model in gpu_parts.FULL for name in gpu_parts.PRECISIONS}
    plain = {f"mfu-{model}-bf16{part}" for model in gpu_parts.FULL for part in ("", "-local")}
    assert needed == (mfu - plain) | {"fp8", "speed-fp8"}


def test_a_part_that_cannot_say_what_it_measured_failed(
    gpu_check: ModuleType, tmp_path: Path
) -> None:
    """It is on the page, and the parts after it are run."""
    gpu_check._run_part(Part("decode", "a part", ("true",)), tmp_path, WHERE)
    result = json.loads((tmp_path / "decode.json").read_text())
    assert not result["passed"] and "cannot say what it measured" in result["summary"]
    assert "FileNotFoundError" in gpu_check._page(tmp_path, {})


def test_a_part_whose_files_are_gone_is_run_again(
    suite: Callable[..., str], tmp_path: Path
) -> None:
    """Results travel between lent machines, data sets stay behind."""
    part = noted("x", "touch $WORK/data.bin", makes=("data.bin",))
    for _ in range(2):
        suite(part)
    (tmp_path / "data.bin").unlink()
    suite(part)
    assert (tmp_path / "order").read_text() == "x\nx\n" and (tmp_path / "data.bin").exists()


def test_what_there_was_no_time_for_is_not_a_failure(gpu_check: ModuleType, tmp_path: Path) -> None:
    """Its output is kept, also while it runs; what it was before stays."""
    part = Part("tests", "a part", ("echo so far; sleep 30", "touch never"))
    gpu_check._run_part(part, tmp_path, WHERE, left_s=1)
    assert (tmp_path / "tests.log").read_text() == "so far\n"
    assert not (tmp_path / "tests.json").exists()


def test_a_failure_ends_the_part_and_is_shown(gpu_check: ModuleType, tmp_path: Path) -> None:
    part = Part("tests", "a part", ("echo no kernel; exit 3", "touch never"))
    gpu_check._run_part(part, tmp_path, WHERE)
    result = json.loads((tmp_path / "tests.json").read_text())
    assert result["passed"] is False and "no kernel" in result["summary"]
    page = gpu_check._page(tmp_path, {})
    assert "FAILED" in page and "exit code 3" in page


def cells(table: str) -> list[list[str]]:
    """A Markdown table without the line below its head."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    return rows[:1] + rows[2:]


def test_tables_of_what_was_measured(gpu_check: ModuleType, tmp_path: Path) -> None:
    decoded = {"ms_per_token": 1.2345, "cache_bytes_per_sequence": 4096, "batch": 4}
    decoded |= {"context": 224, "dtype": "bfloat16"}
    (tmp_path / "decode.json").write_text(json.dumps({"plt2": decoded}))
    assert cells(gpu_check._summary("decode", tmp_path, "")) == [
        ["model", "ms per token", "cache KiB per sequence", "batch", "context", "dtype"],
        ["plt2", "1.23", "4", "4", "224", "bfloat16"],
    ]
    for model in gpu_parts.MODELS:
        (tmp_path / "runs" / model).mkdir(parents=True)
        records = [{"perf/tokens_per_second_per_gpu": speed} for speed in (9, 1000, 2000)]
        records.append({"train/loss": 2, "valid/loss": 3, "memory/peak_gib": 1.5})
        lines = [json.dumps(record) for record in records]
        (tmp_path / "runs" / model / "metrics.jsonl").write_text("\n".join(lines))
    head, *rows = cells(gpu_check._summary("train", tmp_path, ""))
    assert head == ["model", "loss", "validation loss", "tokens/s per GPU", "MFU", "peak GiB"]
    assert rows == [[m, "2.000", "3.000", "1,000", "-", "1.50"] for m in gpu_parts.MODELS]
    (tmp_path / "learn/row5-seed2").mkdir(parents=True)
    records[-1]["perf/mfu"] = 0.251
    (tmp_path / "learn/row5-seed2/metrics.jsonl").write_text("\n".join(map(json.dumps, records)))
    learned = cells(gpu_check._summary("learn-row5-seed2", tmp_path, ""))
    assert learned[1:] == [["row5-seed2", "2.000", "3.000", "1,000", "25.1%", "1.50"]]


def report(folder: Path, name: str, ratio: float | None, mfu: float | None, speed: float) -> None:
    """Write what benchmark_train.py leaves in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    where = {"device": "GPU", "versions": "v", "commit": "abc", "command": "`python it`"}
    tree = {"where": where, "setup": {"model": "ten layers", "step": "a step"}}
    tree |= {"ratio": ratio and {"median": ratio}, "rows": [{"mfu": mfu}]}
    tree["rows"][0]["tokens_per_second"] = speed
    (folder / f"{name}.json").write_text(json.dumps(tree))
    (folder / f"{name}.md").write_text(f"## {name}: text\n")
    (folder / f"{name}.profile.md").write_text("### step, one step\n\n| kernel | ms |\n")


def test_targets_stand_beside_what_was_measured(gpu_check: ModuleType, tmp_path: Path) -> None:
    report(tmp_path / "mfu-fine-bf16", "mfu", None, 0.43, 1000.0)
    report(tmp_path / "mfu-wide-bf16", "mfu", None, 0.5, 1000.0)
    report(tmp_path / "mfu-wide-blockwise", "mfu", None, 0.55, 1300.0)
    report(tmp_path / "speed", "loops", 2.01, None, 1.0)
    runs = logged_rows(
        tmp_path / "runs", {"plt2": 3.0, "plt2-delayed": 3.02, "plt2-blockwise": 3.5}, (1,)
    )
    for folder in list(runs.iterdir()):
        folder.rename(folder.with_name(folder.name.removesuffix("-seed1")))
    curve = "loss curve of 200 steps beside bf16's"
    fine, wide = (words for words, _ in gpu_parts.FULL.values())
    text = gpu_check._page(tmp_path, {}).split("## Targets\n\n")[1].split("\n\n")[0]
    head, *rows = cells(text)
    assert head == ["what", "wanted", "measured", "", "commit"]
    faster, inside = "tokens per second", "weight gradients added inside the products"
    assert [row for row in rows if row[2] != "not run"] == [
        [f"MFU, {fine}, bf16", "at least 45 %", "43.0%", "MISSED", "abc"],
        [f"MFU, {wide}, bf16", "at least 45 %", "50.0%", "met", "abc"],
        [f"FP8 blockwise / bf16, {wide}, {faster}", "at least 1.25", "1.300", "met", "abc"],
        [f"FP8 delayed, {curve}", "within 1 %", "0.65%", "met", "unknown"],
        [f"FP8 blockwise, {curve}", "within 1 %", "16.22%", "MISSED", "unknown"],
        ["PLT-2 step / vanilla step", "at most 2.05", "2.010", "met", "abc"],
    ]
    assert len(rows) == 2 * len(gpu_parts.PRECISIONS) + len(gpu_parts.RECIPES) + 2
    for row in (
        [f"MFU, {fine}, bf16, {inside}", "at least 45 %", "not run", "", ""],
        [f"MFU, {wide}, bf16, PyTorch's layers", "at least 45 %", "not run", "", ""],
        [f"FP8 tensorwise / bf16, {fine}, {faster}", "at least 1.25", "not run", "", ""],
        [f"FP8 tensorwise, {curve}", "within 1 %", "not run", "", ""],
        ["our vanilla step / Megatron-core's", "at most 1.0", "not run", "", ""],
    ):
        assert row in rows
    lines = (runs / "plt2-delayed/metrics.jsonl").read_text().splitlines()
    (runs / "plt2-delayed/metrics.jsonl").write_text("\n".join(lines[:-1]))
    report(tmp_path / "mfu-fine-bf16", "mfu", None, None, 1000.0)
    page = gpu_check._page(tmp_path, {})
    assert "| unknown  | a run ended early |" in page, "nobody knows what it would have come to"
    assert "| unknown  | no listed peak " in page
    assert gpu_check._summary("mfu-fine-bf16", tmp_path, "") == "### mfu: text\n"


def test_targets_are_the_benchmarks_goals() -> None:
    """Of ratios; gpu_check does not load Megatron, so they stand in both."""
    from pltmoe.train.benchmark.compare import COMPARISONS

    for name in ("loops", "megatron"):
        goal = COMPARISONS[name].goal_on_gpu
        target = next(t for t in gpu_tables._targets() if t.files == (f"speed/{name}.json",))
        assert goal is not None and target.is_met_by(goal.at_most)
        assert not target.is_met_by(goal.at_most + 0.001)
        assert float(target.wanted.removeprefix("at most ")) == goal.at_most


def test_pages_and_picture_are_made_from_what_was_measured(
    gpu_check: ModuleType, tmp_path: Path
) -> None:
    page = tmp_path / "docs/gpu_results.md"
    page.parent.mkdir()
    gpu_check._write_pages(tmp_path, page)
    profiles = (tmp_path / "docs/profile.md").read_text()
    assert not_run(profiles) == [title for title, _, _ in gpu_parts.PROFILES]
    assert not (tmp_path / "docs/gpu_learning.png").exists()
    report(tmp_path / "mfu-fine-bf16", "mfu", None, 0.43, 1000.0)
    logged_rows(tmp_path / "learn", {"row1": 3.0, "row4": 2.9, "plt2-normed": 2.8})
    gpu_check._write_pages(tmp_path, page)
    profiles = (tmp_path / "docs/profile.md").read_text()
    assert "### step, one step\n\n| kernel | ms |" in profiles
    assert "GPU, commit abc, v. ten layers; a step. `python it`" in profiles
    assert len(not_run(profiles)) == len(gpu_parts.PROFILES) - 1
    assert (tmp_path / "docs/gpu_learning.png").exists()
    text = page.read_text()
    assert "![Validation losses of the rows](gpu_learning.png)" in text
    assert "- row 4 better than row 1: **shows** (-0.1000, spread 0.0100)" in text
    assert "| plt2-normed |" in text


def test_the_decode_parts_show_the_ratios_and_the_last_one_everything(
    gpu_check: ModuleType, tmp_path: Path
) -> None:
    (tmp_path / "decode").mkdir()
    (tmp_path / "decode/decode.md").write_text(
        "# Decoding\n\n## The paper's ratios\n\nratios\n\n## one size\n\ntimes\n"
    )
    first = gpu_check._summary("decode-one-size", tmp_path, "")
    assert "ratios" in first and "times" not in first
    last = gpu_check._summary(gpu_parts.LAST_DECODING, tmp_path, "")
    assert "times" in last and "#### one size" in last
