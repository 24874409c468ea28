"""What stands in for CUDA: devices, dtype names, random state, and nothing else."""

import subprocess
import sys

import pytest
import torch

from pltmoe.runtime.cpu import is_standing_in, stand_in_for_cuda
from tests.launch import REPOSITORY

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="there is a GPU: nothing stands in for it"
)


def test_standing_in_twice_changes_nothing() -> None:
    before = torch.zeros
    assert stand_in_for_cuda() and is_standing_in()
    assert torch.zeros is before


def test_cuda_devices_mean_the_cpu() -> None:
    assert torch.zeros(2, device="cuda").device.type == "cpu"
    assert torch.tensor([1.0], device=torch.device("cuda", 0)).device.type == "cpu"
    assert torch.zeros(2).to("cuda:0").device.type == "cpu"
    assert torch.zeros(2).cuda().device.type == "cpu"
    assert torch.nn.Linear(2, 2).cuda().weight.device.type == "cpu"
    assert torch.zeros(2).to(torch.float64).dtype == torch.float64


def test_types_have_the_names_megatron_compares_with() -> None:
    assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
    assert torch.zeros(1).bfloat16().type() == "torch.cuda.BFloat16Tensor"
    assert torch.zeros(1).type(torch.float64).dtype == torch.float64


def test_device_context_still_reaches_the_factories() -> None:
    """Modules that transformers builds on "meta" once held garbage, without an error."""
    with torch.device("meta"):
        assert torch.zeros(2).device.type == "meta"
        assert torch.arange(3).device.type == "meta"
        assert torch.nn.Linear(2, 2).weight.device.type == "meta"
    assert torch.zeros(2).device.type == "cpu"


def test_random_state_round_trip() -> None:
    state = torch.cuda.get_rng_state()
    first = torch.rand(3)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(3), first)


def test_nothing_is_touched_where_there_is_a_gpu() -> None:
    script = (
        "import torch; torch.cuda.is_available = lambda: True;"
        "before = torch.zeros, torch.Tensor.to;"
        "from pltmoe.runtime.cpu import stand_in_for_cuda, is_standing_in;"
        "assert not stand_in_for_cuda() and not is_standing_in();"
        "assert (torch.zeros, torch.Tensor.to) == before; print('untouched')"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.stdout.strip() == "untouched", done.stderr
