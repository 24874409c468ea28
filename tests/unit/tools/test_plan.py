"""tools/plan.py: the page in docs, what fits, what is refused, and pictures."""

import json
from functools import partial
from pathlib import Path

import pytest
from sentencepiece import SentencePieceTrainer

from tests.repository import REPOSITORY, run_python, run_tool

PLT = "configs/plt_1.7b_40b.yaml"


plan = partial(run_tool, "plan.py")


def test_the_page_in_docs_is_what_the_command_writes(tmp_path: Path):
    assert run_python("tools/plan.py", "--table", tmp_path / "plan.md").returncode == 0
    assert (tmp_path / "plan.md").read_text() == (REPOSITORY / "docs/plan.md").read_text()


def test_what_fits_is_printed_with_its_parts():
    done = plan("--config", PLT, "--gpus", 64, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)
    text = plan("--config", PLT, "--gpus", 64).stdout
    for part in ("parameters", "gradients", "optimizer", "activations", "EP all-to-all", "MFU"):
        assert part in text


def test_what_does_not_fit_is_refused_with_the_number():
    done = plan("--config", "configs/vanilla_2.5b_60b.yaml", "--gpus", 8)
    assert done.returncode in (1, 2)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "needs 153.5 GiB per GPU and has 130.4 GiB" in line


@pytest.mark.parametrize("number", ["0", "-8", "x", "1.5"])
def test_a_number_of_gpus_is_at_least_one(number):
    done = plan("--config", PLT, "--gpus", number)
    assert done.returncode == 2 and not done.stdout
    assert f"argument --gpus: '{number}' is not a whole number of at least 1" in done.stderr


def test_search_lists_layouts_that_fit_or_says_that_there_is_none():
    done = plan("--config", PLT, "--gpus", 8, "--search", "--rows", 3)
    assert done.returncode == 0 and "fastest: " in done.stdout, done.stderr
    rows = json.loads(plan("--config", PLT, "--gpus", 8, "--search", "--rows", 3, "--json").stdout)
    assert len(rows) == 3 and " ".join(rows[0]["overrides"]) in done.stdout
    none = plan("--config", "configs/vanilla_2.5b_60b.yaml", "--gpus", 1, "--search")
    assert none.returncode and "no layout of vanilla" in none.stderr
    assert "give more GPUs, or a larger one with --gpu" in none.stderr


def test_timeline_is_drawn(tmp_path: Path):
    picture = tmp_path / "timeline.png"
    done = plan("--config", PLT, "--gpus", 16, "--timeline", picture,
                "parallel.pipeline_parallel_size=2")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG") and "stage 1" in done.stdout


@pytest.mark.parametrize("arguments", [(), ("--gpus", 8)])
def test_what_to_plan_must_be_said(arguments):
    done = plan(*arguments)
    assert done.returncode and "give --config FILE and --gpus N (or --table FILE" in done.stderr


def test_a_picture_that_cannot_be_written_is_one_line(tmp_path: Path):
    (tmp_path / "file").write_text("")
    done = plan("--config", PLT, "--gpus", 16, "--timeline", tmp_path / "file/x.png",
                "parallel.pipeline_parallel_size=2")  # fmt: skip
    assert done.returncode == 2 and "the picture cannot be written" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("other", ["--search", "--json"])
def test_a_picture_that_would_not_be_drawn_or_spoil_the_json_is_refused(other):
    done = plan("--config", PLT, "--gpus", 16, other, "--timeline", "never.png")
    assert done.returncode == 2 and not done.stdout
    assert "--timeline draws one layout: leave out --search, --json and --table" in done.stderr


def test_a_setting_behind_timeline_is_not_taken_for_its_picture():
    done = plan("--config", PLT, "--gpus", 16, "--timeline", "parallel.pipeline_parallel_size=2")
    assert done.returncode == 2 and not done.stdout
    assert "'parallel.pipeline_parallel_size=2' is no picture: write --timeline" in done.stderr


def test_files_of_a_run_that_are_missing_or_do_not_fit_are_one_error(tmp_path: Path):
    data = (f"data.tokenizer={tmp_path}/t.model", f"data.train=[{{path: {tmp_path}/a.v1}}]")
    done = plan("--config", PLT, "--data", *data)
    assert done.returncode == 2 and not done.stdout
    for name in ("t.model (data.tokenizer)", "a.v1.bin (data.train)", "a.v1.idx (data.train)"):
        assert f"{tmp_path}/{name}" in done.stderr
    assert "no such file: " in done.stderr and "Make them with tools/train_" in done.stderr
    for name in ("t.model", "a.v1.bin", "a.v1.idx"):
        (tmp_path / name).write_text("")
    done = plan("--config", PLT, "--data", *data)
    assert f"{tmp_path}/t.model: not a sentencepiece model" in done.stderr
    done = plan("--config", PLT, "--data", *data, f"data.tokenizer={tmp_path}")
    assert f"{tmp_path}: cannot be read (Is a directory); name its tokenizer.json" in done.stderr
    (tmp_path / "text").write_text("".join(map(chr, range(33, 127))))
    SentencePieceTrainer.train(input=str(tmp_path / "text"), model_prefix=str(tmp_path / "t"),
                               vocab_size=100, model_type="char", minloglevel=2)  # fmt: skip
    done = plan("--config", PLT, "--data", *data)
    assert done.returncode == 0, done.stderr
    done = plan("--config", PLT, "--data", *data, f"data.valid=[{{path: {tmp_path}/b}}]",
                "data.split=null")  # fmt: skip
    assert f"no such file: {tmp_path}/b.bin (data.valid)" in done.stderr
    done = plan("--config", PLT, "--data", *data, "model.vocab_size=64")
    message = f"(64) is smaller than the vocabulary (98) of data.tokenizer {tmp_path}/t.model"
    assert done.returncode == 2 and f"model.vocab_size {message}" in done.stderr
