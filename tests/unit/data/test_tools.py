"""The three data tools as a user runs them, and a preprocessing run that is really killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from pltmoe.data.indexed import bin_path, idx_path, parts_folder
from pltmoe.data.manifest import manifest_path
from pltmoe.data.tokenizer import Tokenizer
from tests.repository import PYTHONPATH, REPOSITORY, run_python, run_tool


def _run(tool: str, *arguments: object, status: int = 0) -> subprocess.CompletedProcess[str]:
    done = run_tool(tool, *arguments) if status else run_python(f"tools/{tool}", *arguments)
    assert done.returncode == status, done.stderr
    return done


def test_from_sources_to_a_dataset_and_again(tmp_path: Path):
    library = tmp_path / "lib"
    library.mkdir()
    for i in range(30):
        words = " ".join(f"name_{j} = {j * i}\n" for j in range(40))
        (library / f"module_{i}.py").write_text(f"def f{i}():\n    {words}")
    corpus, model, prefix = tmp_path / "c.jsonl", tmp_path / "t.model", tmp_path / "train"
    steps = (
        ("build_corpus.py", "--library", library, "--output", corpus),
        ("train_tokenizer.py", corpus, "--output", model, "--vocab-size", 290),
        ("preprocess_data.py", corpus, "--tokenizer", model, "--output", prefix),
    )
    first = [_run(*step).stdout for step in steps]
    assert "30 documents" in first[0] and "290 pieces" in first[1] and "tokens" in first[2]
    for step, before in zip(steps, first, strict=True):
        again = _run(*step)
        assert again.stdout == before and "up to date, reused" in again.stderr


def test_error_is_one_line(tmp_path: Path, tokenizer: Tokenizer):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "a"}\n{')
    for step in (
        ("build_corpus.py", "--library", tmp_path, "--output", tmp_path / "c.jsonl"),
        ("train_tokenizer.py", bad, "--output", tmp_path / "t.model", "--vocab-size", 300),
        (
            "preprocess_data.py",
            bad,
            "--tokenizer",
            tokenizer.model_path,
            "--output",
            tmp_path / "x",
        ),
        ("build_corpus.py", "--output", bad / "c.jsonl"),
        ("train_tokenizer.py", "/no/text", "--output", bad / "t.model", "--vocab-size", 300),
    ):
        done = _run(*step, status=1)
        assert done.stderr.splitlines()[-1].startswith("error: ")
        if any(str(argument).startswith(f"{bad}/") for argument in step):  # before any work
            assert f": cannot be written ({bad}: File exists)" in done.stderr
        assert "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.jsonl"]


def test_killed_run_continues_with_the_same_bytes(
    tmp_path: Path, corpus: Path, tokenizer: Tokenizer
):
    """After kill -9 no worker lives on, finished parts are used, and the bytes are the same."""
    prefix, reference = tmp_path / "out", tmp_path / "ref" / "out"
    arguments = ("preprocess_data.py", corpus, "--tokenizer", tokenizer.model_path)
    _run(*arguments, "--output", reference, "--workers", 1)

    tool, *words = map(str, (*arguments, "--output", prefix, "--workers", 2))
    killed = subprocess.Popen(
        [sys.executable, REPOSITORY / "tools" / tool, *words],
        env=os.environ | {"PYTHONPATH": PYTHONPATH},
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while not list(parts_folder(prefix).glob("*.json")):
        assert killed.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    children = Path(f"/proc/{killed.pid}/task/{killed.pid}/children").read_text().split()
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert len(children) >= 2 and not bin_path(prefix).exists()
    while any(_runs(child) for child in children):
        assert time.monotonic() < deadline, "a worker lives on without its parent"
        time.sleep(0.05)

    again = _run(*arguments, "--output", prefix, "--workers", 1)
    assert "continuing: " in again.stderr, "finished parts were done again"
    for path in (bin_path, idx_path, manifest_path):
        assert path(prefix).read_bytes() == path(reference).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "out.bin",
        "out.idx",
        "out.manifest.json",
        "ref",
    ]
    assert json.loads(manifest_path(prefix).read_text())["documents"] > 100


def _runs(pid: str) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"
