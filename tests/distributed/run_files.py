"""A real tiny run on disk: text, tokenizer, indexed dataset and configuration file."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from pltmoe.data.preprocess import preprocess
from pltmoe.data.tokenizer_training import TrainingOptions, train_tokenizer
from tests.distributed.tiny import MOE
from tests.launch import REPOSITORY, STORE_IS_OPEN, open_store

VOCABULARY = 400


def make_files(folder: Path) -> Path:
    """Write a corpus of this repository's own modules and a configuration; return the YAML file."""
    text = folder / "text"
    text.mkdir()
    for number, source in enumerate(sorted((REPOSITORY / "pltmoe" / "config").glob("*.py"))):
        (text / f"{number}.txt").write_text(source.read_text())
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
    store, processes = open_store(), []
    for rank in range(nprocs):
        world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": nprocs, "MASTER_PORT": store.port}
        launcher = {key: str(value) for key, value in world.items()} | STORE_IS_OPEN
        launcher["MASTER_ADDR"] = "127.0.0.1"
        processes.append(
            subprocess.Popen(
                [sys.executable, "tools/pretrain.py", "--config", str(config), *overrides],
                cwd=REPOSITORY,
                env={
                    **os.environ,
                    "OMP_NUM_THREADS": "1",
                    "GLOO_SOCKET_IFNAME": "lo",
                    "PYTHONPATH": str(REPOSITORY),
                    **(launcher if nprocs > 1 else {}),
                    **env,
                },
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
        processes[-1].store = store  # stays open as long as somebody holds a rank
    return processes


def finish(processes: list[Any], timeout_s: float = 300.0) -> tuple[list[int], list[str]]:
    """Wait for all ranks; return exit codes and outputs in rank order."""
    outputs = [process.communicate(timeout=timeout_s)[0] for process in processes]
    return [process.returncode for process in processes], outputs
