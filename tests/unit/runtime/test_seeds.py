"""Every generator is seeded, and comes back to where it was."""

import os
import random

import numpy as np
import pytest
import torch

from pltmoe.runtime import seeds

pytestmark = pytest.mark.usefixtures("groups")  # Megatron's tracker asks for them


def draw() -> tuple[float, ...]:
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    with get_cuda_rng_tracker().fork():
        tracked = torch.rand(()).item()
    return random.random(), float(np.random.rand()), torch.rand(()).item(), tracked


def test_a_seed_decides_every_generator():
    seeds.seed_everything(7)
    first = draw()
    seeds.seed_everything(7)
    assert draw() == first
    seeds.seed_everything(8)
    assert not set(draw()) & set(first)


def test_states_come_back(monkeypatch):
    seeds.seed_everything(7)
    draw()
    state = seeds.random_state()
    first = draw()
    assert draw() != first
    seeds.restore_random_state(state)
    assert draw() == first
    given: list[torch.Tensor] = []
    monkeypatch.setattr(torch.cuda, "set_rng_state", given.append)  # the CPU's own, without a GPU
    seeds.restore_random_state(state)
    assert [torch.equal(device, state["cuda"]) for device in given] == [True]


def test_states_of_another_kind_of_device_are_left_out(caplog):
    """A checkpoint made on a CPU once could not be continued on a GPU: its state has 16 bytes."""
    seeds.seed_everything(7)
    state = seeds.random_state()
    first = draw()
    state |= {"cuda": torch.zeros(16, dtype=torch.uint8), "megatron": {}}
    seeds.seed_everything(8)
    with caplog.at_level("WARNING"):
        seeds.restore_random_state(state)
    assert "random state is of another kind of device" in caplog.text
    assert draw()[:3] == first[:3], "the generators of Python, NumPy and the CPU come back"


def test_deterministic_mode_asks_for_repeatable_kernels(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "1")
    try:
        seeds.seed_everything(7, deterministic=True)
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] == "0"
    finally:
        torch.use_deterministic_algorithms(False)
