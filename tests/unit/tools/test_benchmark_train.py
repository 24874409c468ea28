"""The command from end to end with a model of no size: what it writes, not how fast it is."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from tests.repository import run_python, run_tool

ONE_WORKER = pytest.mark.xdist_group(__name__)
"""Of the tests that read one measurement."""
TINY = [
    "model.vocab_size=64",
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.num_attention_heads=4",
    "model.head_dim=8",
    "model.num_experts=4",
    "model.moe_ffn_hidden_size=16",
    "data.sequence_length=128",  # longer than the window
    "train.micro_batch_size=2",
    "train.global_batch_size=4",
    "optimizer.lr=0.01",
    "optimizer.warmup_steps=0",
]


def run(
    *arguments: str, launcher: tuple[str, ...] = (), **variables: str
) -> subprocess.CompletedProcess[str]:
    one = {"OMP_NUM_THREADS": "1"} | variables
    return run_python(*launcher, "tools/benchmark_train.py", *arguments, **one)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The defaults for a configuration of one stage, with experts on two processes."""
    folder = tmp_path_factory.mktemp("benchmark")
    how = ["--config", "configs/quickstart_plt2.yaml", "--rounds", "4", "--warm-up", "1"]
    more = ["--profile", "--output", str(folder), *TINY[:-3], "train.global_batch_size=8"]
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = run(*how, *more, *TINY[-2:], launcher=launcher)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("pipeline is left out: parallel.pipeline_parallel_size is 1\n") == 1
    return folder, done.stdout


@ONE_WORKER
def test_loops(measured: tuple[Path, str]) -> None:
    folder, said = measured
    found = json.loads((folder / "loops.json").read_text())
    names = [row["name"] for row in found["rows"]]
    assert names == ["looped", "vanilla"]
    assert found["goal"] == {"at_most": 2.15, "at_least": 0.0}
    assert found["goal_is_met"] == (found["ratio"]["median"] <= 2.15)
    looped, vanilla = found["rows"]
    assert looped["tokens_per_second"] == pytest.approx(8 * 128e3 / looped["milliseconds"])
    per_token = [row["tflops"] / row["tokens_per_second"] for row in (looped, vanilla)]
    assert 1.5 < per_token[0] / per_token[1] < 2.5, "two loops and a window, one head"
    assert (folder / "loops.md").read_text() in said
    assert looped["mfu"] is None, "a CPU has no listed peak"
    profiles = (folder / "loops.profile.md").read_text()
    assert profiles in said
    assert "### looped, one step\n" in profiles and "### vanilla, one step\n" in profiles
    assert re.search(r"^\| aten::mm \| [\d.]+ \| [\d.]+% \| [\d,]+ \|$", profiles, re.MULTILINE)
    assert "others | " in profiles and "| together | " in profiles


def test_one_model_alone(tmp_path: Path) -> None:
    done = run("--compare", "mfu", "--rounds", "2", "--output", str(tmp_path), *TINY)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "mfu.json").read_text())
    assert [row["name"] for row in found["rows"]] == ["step"] and found["ratio"] is None
    assert found["goal_is_met"] is None and "2 loops" in found["setup"]["model"]
    page = (tmp_path / "mfu.md").read_text()
    assert "**MFU unknown**, goal at least 0.45: the device has no listed peak." in page
    assert "- peak memory of this process: " in page
    assert re.search(r"INFO step runs with\n  attention +torch \(scaled_dot", done.stderr), "told"
    assert not (tmp_path / "mfu.profile.md").exists()


@ONE_WORKER
def test_megatron_computes_the_same(measured: tuple[Path, str]) -> None:
    folder, _ = measured
    found = json.loads((folder / "megatron.json").read_text())
    assert [r["name"] for r in found["rows"]] == [
        "vanilla",
        "Megatron-core",
        "Megatron-core, SDPA",
    ]
    said = next(note for note in found["notes"] if note.startswith("largest difference of their"))
    assert any("no statistics of the routers" in note for note in found["notes"])
    assert float(said.split()[-1]) < 1e-4, "after updates, too: the first step comes before"
    assert found["goal"]["at_most"] == 1.03


@ONE_WORKER
def test_says_where_and_how(measured: tuple[Path, str]) -> None:
    folder, _ = measured
    page = (folder / "megatron.md").read_text()
    for what in (
        "- command: `python tools/benchmark_train.py --config configs/quickstart_plt2.yaml",
        "- device: ",
        "torch ",
        "- commit: ",
        "2 layers of width 32",
        "2 micro batch(es) of 2 x 128 tokens on each rank, EP2 x DP2",
    ):
        assert what in page, what


def test_unknown_comparison() -> None:
    done = run_tool("benchmark_train.py", "--compare", "loops,deepspeed")
    assert done.returncode == 2
    assert (
        "unknown comparison deepspeed; there are loops, megatron, pipeline, precision, mfu"
        in done.stderr
    )


def test_pipeline(tmp_path: Path) -> None:
    """The command starts two processes by itself, and one of them writes."""
    done = run("--compare", "pipeline", "--rounds", "2", "--output", str(tmp_path), *TINY)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "pipeline.json").read_text())
    names = [row["name"] for row in found["rows"]]
    assert names == [
        "forward and backward",
        "predicted",
        "predicted for one pipeline per loop",
        "whole step, with the update",
    ]
    assert found["goal"] == {"at_most": 1.15, "at_least": 0.85}
    assert "2 micro batch(es) of 2 x 128 tokens on each rank, PP2 x DP1" in found["setup"]["step"]
    passes, predicted, naive, step = (row["milliseconds"] for row in found["rows"])
    assert 0 < predicted < naive and passes < step
    assert done.stdout.count("## pipeline: ") == 1


def test_engines(tmp_path: Path) -> None:
    """Both engines in turn on two processes, and what each holds; what cannot be says why."""
    done = run("--compare", "engines", "--rounds", "2", "--output", str(tmp_path), *TINY)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "engines.json").read_text())
    zero = [f"DeepSpeed, ZeRO {stage}" for stage in range(3)]
    offloaded = "DeepSpeed, ZeRO 2, optimizer in host memory"
    assert [row["name"] for row in found["rows"]] == ["Megatron", *zero, offloaded]
    assert found["ratio"]["median"] > 0 and "EP2" in found["setup"]["step"]
    assert found["where"]["command"].count("--compare engines") == 1, "as it was typed"
    assert any(note.startswith("left out: DeepSpeed, ZeRO 3: ") for note in found["notes"])
    said = re.findall(r"DeepSpeed, ZeRO 2 / (.*?): [\d.]+\n", "\n".join(found["notes"]))
    assert said == [*zero[:2], offloaded], "the goal's ratio stands above them"
    held = dict(re.findall(r"this rank, ([^:]+): ([\d.]+) MiB between", " ".join(found["notes"])))
    assert held.keys() == {"Megatron", *zero, offloaded}
    assert min(map(float, held.values())) > 0  # how many bytes: tests/distributed/test_plan.py


def test_pipeline_needs_stages() -> None:
    """Said before the comparisons in front of it take their time."""
    done = run("--compare", "loops,pipeline", "parallel.pipeline_parallel_size=1")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith(
        "error: --compare pipeline takes whole sequences through several stages: set "
        "parallel.pipeline_parallel_size (is 1) to 2 or more"
    )


def test_counts_the_tasks_of_srun() -> None:
    task = {"STEP_ID": "0", "STEP_NUM_TASKS": "3", "PROCID": "0", "LOCALID": "0"}
    slurm = {f"SLURM_{name}": value for name, value in task.items()}
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    done = run("--compare", "loops", *TINY, **slurm, **where)
    assert done.returncode == 1
    assert "data-parallel size (3, of 3 processes)" in done.stderr
