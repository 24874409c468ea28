"""A real tiny run on disk: its files, its processes, and the metrics that it leaves."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from pltmoe.data.preprocess import preprocess
from pltmoe.data.tokenizer_training import TrainingOptions, train_tokenizer
from tests.distributed.tiny import MOE
from tests.launch import STORE_IS_OPEN, open_store
from tests.repository import PYTHONPATH, REPOSITORY

VOCABULARY = 400


def make_files(folder: Path) -> Path:
    """Write a corpus, of a text that never changes, and a configuration; return the YAML file."""
    text = folder / "text"
    text.mkdir()
    for number, paragraph in enumerate((REPOSITORY / "LICENSE").read_text().split("\n\n")):
        (text / f"{number:02}.txt").write_text(paragraph)
    train_tokenizer([text], folder / "tokenizer.model", TrainingOptions(vocab_size=VOCABULARY))
    preprocess([text], folder / "corpus", folder / "tokenizer.model")
    tree = {
        "name": "tiny",
        "model": MOE | {"vocab_size": VOCABULARY, "init_std": 0.1},
        "data": {
            "tokenizer": str(folder / "tokenizer.model"),
            "train": [{"path": str(folder / "corpus")}],
            "split": [80, 20, 0],
            "sequence_length": 16,
            "reset_position_ids": True,
            "mask_document_ends": True,
        },
        "optimizer": {"lr": 5e-3, "warmup_steps": 2},
        "train": {
            "output_dir": str(folder / "run"),
            "steps": 8,
            "global_batch_size": 4,
            "micro_batch_size": 1,
            "log_interval": 1,
            "eval_interval": 4,
            "eval_steps": 2,
        },
        "checkpoint": {"save_interval": 4},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def start_ranks(config: Path, *overrides: str, nprocs: int = 1, **env: str) -> list[Any]:
    """Start ``tools/pretrain.py`` on ``nprocs`` processes the way torchrun does."""
    command = ["tools/pretrain.py", "--config", str(config), *overrides]
    return start_python(command, nprocs, **env)


def start_python(command: list[str], nprocs: int, port: int | None = None, **env: str) -> list[Any]:
    """Start Python on ``nprocs`` processes; they meet at a store of ours, or rank 0's on ``port``.

    A single process is told of no others.
    """
    processes, store = [], None if port else open_store()
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port if store else port)}
    meeting |= STORE_IS_OPEN if store else {}
    for rank in range(nprocs):
        world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": nprocs}
        launcher = {key: str(value) for key, value in world.items()} | meeting
        environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        environment |= {"PYTHONPATH": PYTHONPATH, **(launcher if nprocs > 1 else {}), **env}
        processes.append(
            subprocess.Popen(
                [sys.executable, *command],
                cwd=REPOSITORY,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
        processes[-1].store = store  # stays open as long as somebody holds a rank
    return processes


def wait_for(process: Any, text: str) -> str:
    """Read the output of a process up to a line that contains ``text``."""
    seen = ""
    for line in process.stdout:
        seen += line
        if text in line:
            return seen
    raise AssertionError(f"never said {text!r}:\n{seen}")


def finish(processes: list[Any], timeout_s: float = 300.0) -> tuple[list[int], list[str]]:
    """Wait for all ranks; return exit codes and outputs in rank order."""
    outputs = [process.communicate(timeout=timeout_s)[0] for process in processes]
    return [process.returncode for process in processes], outputs


def lines_of(output: Path) -> list[dict[str, Any]]:
    """Return what a run has written to metrics.jsonl."""
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def losses_of(output: Path) -> dict[int, float]:
    """Return the training loss of a run by step."""
    return {line["step"]: line["train/loss"] for line in lines_of(output) if "train/loss" in line}


def curve_of(output: Path) -> list[dict[str, Any]]:
    """Return the lines without what depends on the clock, and without those of saves."""
    return [
        {k: v for k, v in line.items() if not k.startswith(("perf/", "memory/", "time"))}
        for line in lines_of(output)
        if "checkpoint/save_seconds" not in line
    ]
