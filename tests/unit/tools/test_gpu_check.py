"""gpu_check without a GPU: it refuses, remembers parts, and never claims what was not run."""

import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.launch import REPOSITORY

WHERE = {"device": "GPU", "versions": "v", "commit": "abc"}


@pytest.fixture
def gpu_check() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_check", REPOSITORY / "tools/gpu_check.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_check"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_refuses_without_a_gpu() -> None:
    done = subprocess.run(
        [sys.executable, "tools/gpu_check.py"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        env={"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPOSITORY), "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 2
    assert done.stdout == (
        "error: gpu_check needs an NVIDIA GPU (torch.cuda.is_available() is false)\n"
    )


def test_page_in_the_repository_is_what_the_tool_writes(
    gpu_check: ModuleType, tmp_path: Path
) -> None:
    page = (REPOSITORY / "docs/gpu_results.md").read_text()
    for part in gpu_check.PARTS:
        assert f"## {part.name}: {part.what}" in page
    assert gpu_check._page(tmp_path).count("Not run.") == len(gpu_check.PARTS)


def test_a_passed_part_is_not_run_again(gpu_check: ModuleType, tmp_path: Path) -> None:
    count = tmp_path / "count"
    part = gpu_check.Part("tests", "a part", (f"echo x >> {count}; echo '3 passed in 1.00s'",))
    for again in (False, False, True):
        gpu_check._run_part(part, tmp_path, WHERE, again)
    assert count.read_text() == "x\nx\n"
    assert "3 passed in 1.00s" in gpu_check._page(tmp_path)
    gpu_check._run_part(part, tmp_path, {**WHERE, "commit": "new"}, False)
    assert count.read_text() == "x\nx\nx\n"


def test_a_failure_ends_the_part_and_is_shown(gpu_check: ModuleType, tmp_path: Path) -> None:
    part = gpu_check.Part("tests", "a part", ("echo no kernel; exit 3", "touch never"))
    gpu_check._run_part(part, tmp_path, WHERE, False)
    result = json.loads((tmp_path / "tests.json").read_text())
    assert result["passed"] is False and "no kernel" in result["summary"]
    page = gpu_check._page(tmp_path)
    assert "FAILED" in page and "exit code 3" in page


def test_tables_of_what_was_measured(gpu_check: ModuleType, tmp_path: Path) -> None:
    decoded = {"ms_per_token": 1.2345, "cache_bytes_per_sequence": 4096, "batch": 4}
    decoded |= {"context": 224, "dtype": "bfloat16"}
    (tmp_path / "decode.json").write_text(json.dumps({"plt2": decoded}))
    assert gpu_check._summary("decode", tmp_path, "") == (
        "| model | ms per token | cache KiB per sequence | batch | context | dtype |\n"
        "| --- | --- | --- | --- | --- | --- |\n"
        "| plt2 | 1.23 | 4 | 4 | 224 | bfloat16 |"
    )
    for model in gpu_check.MODELS:
        (tmp_path / "runs" / model).mkdir(parents=True)
        records = [{"perf/tokens_per_second_per_gpu": speed} for speed in (9, 1000, 2000)]
        records.append({"train/loss": 2, "valid/loss": 3, "memory/peak_gib": 1.5})
        lines = [json.dumps(record) for record in records]
        (tmp_path / "runs" / model / "metrics.jsonl").write_text("\n".join(lines))
    rows = gpu_check._summary("train", tmp_path, "").splitlines()
    assert rows[0] == "| model | loss | validation loss | tokens/s per GPU | MFU | peak GiB |"
    assert rows[2:] == [f"| {m} | 2.000 | 3.000 | 1,000 | - | 1.50 |" for m in gpu_check.MODELS]
    (tmp_path / "learn/row5").mkdir(parents=True)
    records[-1]["perf/mfu"] = 0.251
    (tmp_path / "learn/row5/metrics.jsonl").write_text("\n".join(map(json.dumps, records)))
    learned = gpu_check._summary("learn-row1", tmp_path, "").splitlines()
    assert learned[2:] == ["| row5 | 2.000 | 3.000 | 1,000 | 25.1% | 1.50 |"]


def test_the_training_parts_are_valid_runs(gpu_check: ModuleType) -> None:
    """A part that fails at its configuration would waste a lent machine."""
    from pltmoe.config import load_config

    seen = 0
    for part in gpu_check.PARTS:
        for command in part.commands:
            words = shlex.split(command.replace("{{", "{").replace("}}", "}"))
            if not {"tools/pretrain.py", "tools/benchmark_train.py"} & set(words):
                continue
            assert command.format(python="python").count("{") == command.count("{{")
            overrides = [
                w
                for w in words
                if re.match(r"(data|model|train|optimizer|parallel|checkpoint)\.", w)
            ]
            config = load_config(REPOSITORY / words[words.index("--config") + 1], overrides)
            if part.name == "fp8":
                assert config.train.precision == "fp8"
            if part.name == "learn-plt2-shared-routing":
                assert config.model.moe_loop_routing == "shared"
            seen += 1
    assert seen >= 3 + len(gpu_check.RECIPES) + 2 + len(gpu_check.LEARNING)


def test_the_decode_parts_show_the_ratios_and_the_last_one_everything(
    gpu_check: ModuleType, tmp_path: Path
) -> None:
    (tmp_path / "decode").mkdir()
    (tmp_path / "decode/decode.md").write_text(
        "# Decoding\n\n## The paper's ratios\n\nratios\n\n## one size\n\ntimes\n"
    )
    first = gpu_check._summary("decode-one-size", tmp_path, "")
    assert "ratios" in first and "times" not in first
    last = gpu_check._summary(gpu_check.PARTS[-1].name, tmp_path, "")
    assert "times" in last and "#### one size" in last


def test_the_decode_parts_name_models_and_options_that_exist(gpu_check: ModuleType) -> None:
    """A part that fails at the command line would waste a lent machine."""
    from pltmoe.inference.benchmark.suite import ABLATION, HEADLINE, candidates

    names = {c.name for c in candidates(REPOSITORY / "configs", [ABLATION, HEADLINE])}
    parts = [part for part in gpu_check.PARTS if part.name.startswith("decode-")]
    help_text = subprocess.run(
        [sys.executable, "tools/benchmark_decode.py", "--help"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    ).stdout
    assert parts
    for part in parts:
        words = shlex.split(part.commands[0])
        assert {w for w in words if w.startswith("--")} <= set(
            re.findall(r"--[a-z0-9-]+", help_text)
        )
        only = [words[i + 1] for i, word in enumerate(words) if word == "--only"]
        assert set(only) <= names
