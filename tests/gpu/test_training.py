"""A real run of tools/pretrain.py on the GPU: bf16, resume, and the way to Hugging Face."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.distributed.run_files import finish, make_files, start_ranks
from tests.launch import REPOSITORY


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty steps in two legs; the second resumes the first."""
    config = make_files(tmp_path_factory.mktemp("run"))
    more = ["train.micro_batch_size=2", "model.head_dim=16", "train.log_interval=1"]
    for steps in ("20", "40"):
        codes, outputs = finish(start_ranks(config, f"train.steps={steps}", *more), 300)
        assert codes == [0], outputs[0]
        assert "bf16" in outputs[0]
    return config.parent / "run"


def test_loss_falls_and_the_run_resumes(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}
    assert sorted(losses) == list(range(1, 41))
    assert losses[40] < losses[1] - 0.5
    assert all(line["memory/peak_gib"] > 0 for line in lines if "memory/peak_gib" in line)


def test_checkpoint_made_on_gpu_converts(run: Path, tmp_path: Path) -> None:
    command = [sys.executable, "tools/convert_to_hf.py", "--checkpoint", str(run)]
    done = subprocess.run(
        [*command, "--output", str(tmp_path / "hf")],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "hf" / "model.safetensors.index.json").exists()
    assert torch.cuda.is_available()
