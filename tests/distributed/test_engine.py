"""Every layout trains the same model: one process, EP=2, and two data-parallel ranks."""

import pytest
import torch

from tests.launch import Ranks

pytestmark = [pytest.mark.distributed, pytest.mark.xdist_group("engine")]
CASE = "tests.distributed.engine_cases:train"
STEPS = 4

# Sums over tokens and ranks run in another order, and Adam divides small differences of small
# gradients by their root mean square: 1e-5 relative after four steps leaves a factor of about ten
# over what is seen, and is a hundred times below what a wrong 1/N or a lost rank changes.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture(scope="module")
def one():
    with Ranks(1) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def two():
    with Ranks(2) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def serial(one, tmp_path_factory):
    """Four steps of one process, four micro batches each, with masked tokens."""
    return one.run(CASE, steps=STEPS)[0]


@pytest.mark.parametrize("expert_parallel", [2, 1])
def test_two_processes_equal_one(serial, two, expert_parallel):
    reports = two.run(CASE, steps=STEPS, parallel__expert_parallel_size=expert_parallel)
    for report in reports:
        for key in ("losses", "norms", "rates"):
            assert report[key] == pytest.approx(serial[key], rel=1e-5), key
        assert report["valid"] == pytest.approx(serial["valid"], rel=1e-5)
        assert report["metrics"] == pytest.approx(serial["metrics"], rel=1e-4)
        assert report["biases"].keys() == serial["biases"].keys() != set()
        for name, bias in report["biases"].items():
            torch.testing.assert_close(bias, serial["biases"][name], rtol=0, atol=1e-7)
            assert bias.abs().max() > 0.005, "the bias must have moved"
        for name, weight in report["weights"].items():
            torch.testing.assert_close(weight, serial["weights"][name], **CLOSE)
    held = [set(report["weights"]) for report in reports]
    assert held[0] | held[1] == set(serial["weights"])
    assert (held[0] == held[1]) == (expert_parallel == 1)
