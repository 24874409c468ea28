"""Real runs of tools/pretrain.py on the GPU: resumed, repeated, begun on a CPU, and exported."""

from pathlib import Path

import pytest

from tests.distributed.moves import assert_continues, assert_repeats, begin_on_cpu
from tests.distributed.run_files import finish, lines_of, losses_of, make_files, start_ranks
from tests.repository import run_python


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty steps in two legs; the second resumes the first."""
    config = make_files(tmp_path_factory.mktemp("run"))
    more = ["train.micro_batch_size=2", "model.head_dim=16", "train.log_interval=1"]
    more += ["optimizer.decay_steps=40"]
    for steps in ("20", "40"):
        codes, outputs = finish(start_ranks(config, f"train.steps={steps}", *more), 300)
        assert codes == [0], outputs[0]
        assert "bf16" in outputs[0]
    return config.parent / "run"


def test_loss_falls_and_the_run_resumes(run: Path) -> None:
    losses = losses_of(run)
    assert sorted(losses) == list(range(1, 41))
    assert losses[40] < losses[1] - 0.5
    assert all(line.get("memory/peak_gib", 1) > 0 for line in lines_of(run))


def test_checkpoint_made_on_gpu_converts(run: Path, tmp_path: Path) -> None:
    output = tmp_path / "hf"
    done = run_python("tools/convert_to_hf.py", "--checkpoint", run, "--output", output)
    assert done.returncode == 0, done.stderr
    assert (output / "model.safetensors.index.json").exists()


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def begun(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the CPU of this machine, with a checkpoint on its way."""
    return begin_on_cpu(config, tmp_path_factory.mktemp("cpu"))


@pytest.fixture(params=["local", "transformer_engine"])
def impl(request: pytest.FixtureRequest) -> str:
    if request.param == "transformer_engine":
        pytest.importorskip("transformer_engine.pytorch", reason="needs Transformer Engine")
    return f"train.transformer_impl={request.param}"


@pytest.mark.usefixtures("groups")
def test_two_deterministic_runs_are_the_same_run(config: Path, impl: str, tmp_path: Path) -> None:
    """Losses, weights and moments, bit for bit."""
    assert_repeats(config, tmp_path, "train.deterministic=true", impl, device="cuda")


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-3), ("bf16", 0.02)])
def test_a_checkpoint_made_on_a_cpu_continues(
    precision: str, tolerance: float, config: Path, begun: Path, impl: str, tmp_path: Path
) -> None:
    """Its next losses are those of the run that stays on the CPU."""
    if precision == "fp32" and impl.endswith("transformer_engine"):
        pytest.skip("Transformer Engine is not used in fp32: its products would be TF32")
    changes = (f"train.precision={precision}", impl)
    assert_continues(config, begun, tmp_path, *changes, device="cuda", tolerance=tolerance)
