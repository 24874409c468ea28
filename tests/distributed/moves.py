"""Runs of tools/pretrain.py that are repeated, or moved from one device to another."""

import os
import shutil
from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from torch import Tensor

from tests.distributed.run_files import finish, losses_of, start_ranks

STEPS, MOVED_AT = 6, 4
BASE = (
    f"train.steps={STEPS}", f"checkpoint.save_interval={MOVED_AT}", "checkpoint.keep_last=5",
    "train.micro_batch_size=2", "model.head_dim=16",
)  # fmt: skip


def train(config: Path, output: Path, *overrides: str, device: str) -> dict[int, float]:
    """Run all steps that are left, on ``cpu`` or ``cuda``; return the training loss by step."""
    visible = "" if device == "cpu" else os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    start = start_ranks(
        config, *BASE, f"train.output_dir={output}", *overrides, CUDA_VISIBLE_DEVICES=visible
    )
    codes, outputs = finish(start)
    assert codes == [0], outputs[0]
    assert ("the CPU stands in for CUDA" in outputs[0]) == (device == "cpu"), outputs[0]
    return losses_of(output)


def begin_on_cpu(config: Path, folder: Path) -> Path:
    """Run all steps on a CPU in fp32; return the output directory."""
    train(config, folder / "begun", "train.precision=fp32", device="cpu")
    return folder / "begun"


def move(source: Path, target: Path) -> None:
    """Give another run the checkpoint that ``source`` wrote on its way."""
    name = f"checkpoints/step_{MOVED_AT:08d}"
    shutil.copytree(source / name, target / name)


def weights(output: Path) -> dict[str, Tensor]:
    """Return every tensor of a run's last checkpoint; a process group must be there."""
    folder = output / f"checkpoints/step_{STEPS:08d}"
    found = dist_checkpointing.load_plain_tensors(str(folder))
    return {name: x.cpu() for name, x in found.items() if isinstance(x, torch.Tensor)}


def assert_repeats(config: Path, folder: Path, *overrides: str, device: str) -> None:
    """Raise unless two runs have the same losses and the same weights and moments, bit for bit."""
    outputs = [folder / "first", folder / "second"]
    found = [train(config, output, *overrides, device=device) for output in outputs]
    assert found[0] == found[1] and len(found[0]) == STEPS
    first, second = (weights(output) for output in outputs)
    assert first.keys() == second.keys() and any("exp_avg" in name for name in first)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def assert_continues(
    config: Path, begun: Path, moved: Path, *overrides: str, device: str, tolerance: float
) -> None:
    """Raise unless what began on a CPU goes on with the losses that it has there.

    Args:
        config: configuration file.
        begun: what ``begin_on_cpu`` returned.
        moved: output directory of the run that goes on.
        overrides: its changes.
        device: where it goes on.
        tolerance: of the losses, relative.
    """
    move(begun, moved)
    accepted = "checkpoint.accept_changes=[train.precision]"
    found, expected = train(config, moved, accepted, *overrides, device=device), losses_of(begun)
    assert sorted(found) == list(range(MOVED_AT + 1, STEPS + 1))
    for step, loss in found.items():
        assert abs(loss - expected[step]) <= tolerance * expected[step], (step, found, expected)
