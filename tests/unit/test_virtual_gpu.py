"""What the code for GPUs does with tensors there, seen without one: see tests/virtual_gpu.py."""

import json
from collections import Counter

import pytest

from tests.repository import run_python

pytestmark = pytest.mark.xdist_group(__name__)
TRAINING = ["PLT-2", "vanilla", "shared routing", "recompute all", "recompute some"]
LOSS, NORM = "to: engines/stepping.py", "_local_scalar_dense: megatron/core/optimizer/clip_grads.py"


def run(*command: str) -> str:
    done = run_python("-W", "ignore", "-m", *command, TRITON_INTERPRET="1")
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done.stdout


@pytest.fixture(scope="module")
def waits() -> dict[str, Counter[str]]:
    """Where the host waited in each case: ``operation: file`` without the line."""
    found = json.loads(run("tests.unit.virtual_gpu_cases").splitlines()[-1])
    counted: dict[str, Counter[str]] = {}
    for case, places in found.items():
        counted[case] = Counter()
        for place, times in places.items():
            counted[case][place.rpartition(":")[0]] += times
    return counted


@pytest.mark.parametrize("case", TRAINING)
def test_a_training_step_waits_for_its_loss_and_its_norm_only(
    case: str, waits: dict[str, Counter[str]]
) -> None:
    """One GPU without Transformer Engine, two micro batches and more; nothing mixes devices."""
    assert waits[case] == {LOSS: 1, NORM: 1}


def test_statistics_are_read_in_watched_steps_only(waits: dict[str, Counter[str]]) -> None:
    assert {"to: model/loop_stats.py", "to: model/loop_diagnostics.py", LOSS, NORM} == set(
        waits["watched"]
    )


@pytest.mark.parametrize("case", ["plt3", "vanilla", "plt2 fp8"])
def test_a_decode_step_never_waits(case: str, waits: dict[str, Counter[str]]) -> None:
    """Else it could not become a CUDA graph."""
    assert waits[f"decode {case}"] == {}


def test_waits_and_mixed_devices_are_found(waits: dict[str, Counter[str]]) -> None:
    names = Counter(place.partition(":")[0] for place in waits["deliberate"].elements())
    assert names == {"_local_scalar_dense": 1, "to": 2, "index": 1, "copy_": 1, "synchronize": 1}


def test_the_tests_for_gpus_pass_on_it() -> None:
    """Those of the model: what they compare with lies on the same device, and they can pass."""
    names = "float64 and (row or shared_routing) or bfloat16 and local or grouped or repeat"
    output = run("pytest", "-q", "-n", "0", "-p", "tests.virtual_gpu", "tests/gpu/test_model.py",
                 "-k", names)  # fmt: skip
    assert " passed" in output and "failed" not in output


@pytest.fixture
def transformer_engine() -> None:
    """Its own Python runs, PyTorch computes what its CUDA does: see tests/virtual_te.py."""
    pytest.importorskip("transformer_engine.pytorch", reason="needs Transformer Engine")


@pytest.mark.usefixtures("transformer_engine")
@pytest.mark.parametrize("name", ["row5_plt2", "shared_routing_plt3", "expert_bias"])
def test_a_model_of_transformer_engines_modules_equals_the_reference(name: str) -> None:
    """Logits, loss and every gradient, in float32."""
    assert f"{name} equals the reference" in run("tests.unit.virtual_te_cases", name)


@pytest.mark.usefixtures("transformer_engine")
@pytest.mark.parametrize(
    ("file", "names"),
    [
        ("test_model.py", "row5_plt2-transformer_engine or fused_router"),
        ("test_fp8.py", "row5_plt2-moe or weights or window or validation"),
        ("test_fp8_runs.py", "delayed"),
        ("test_looped_gradients.py", "1-None or 1-delayed or flags_lose_the_gradients"),
    ],
)
def test_the_tests_for_transformer_engine_pass_on_it(file: str, names: str) -> None:
    output = run("pytest", "-q", "-n", "0", "-p", "tests.virtual_te", f"tests/gpu/{file}",
                 "-k", names)  # fmt: skip
    assert " passed" in output and "failed" not in output
