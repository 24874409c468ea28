"""README's commands, run as a user would type them; only smaller sizes are appended."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch import REPOSITORY

README = (REPOSITORY / "README.md").read_text()
BLOCKS = re.findall(r"```(?:bash|sh|shell|console)\n(.*?)```", README, re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.splitlines() if line.strip()]

RUN_BY_CI = {
    "bash tools/quickstart.sh": "bash tools/quickstart.sh --smoke",
    "bash tools/test.sh": "bash tools/test.sh",
}
APPENDED = {
    "tools/pretrain.py": "data.sequence_length=64 train.steps=2 "
    "train.global_batch_size=4 train.micro_batch_size=1 train.eval_interval=2 train.eval_steps=1 "
    "optimizer.warmup_steps=1 model.num_layers=2 model.num_experts=4",
    "tools/convert_from_hf.py": "model.num_layers=2 model.num_experts=4",
    "tools/generate.py": "--max-new-tokens 4",
    "tools/benchmark_decode.py": "--prompt-tokens 16 --new-tokens 2 --rounds 1",
    "tools/evaluate.py": "--limit 2",
}


def tool_of(command: str) -> str:
    return next(word for word in shlex.split(command) if word.startswith("tools/"))


def test_what_ci_runs_is_what_readme_says() -> None:
    ci = (REPOSITORY / ".ci/run").read_text()
    for command, run in RUN_BY_CI.items():
        assert command in COMMANDS
        assert run in ci


def test_commands_for_a_cluster_name_the_data() -> None:
    """What the configurations of the paper's models say there are placeholders."""
    runs = [c for c in COMMANDS if re.search(r" slurm/(pretrain|compare|ablation)", c)]
    assert len(runs) >= 3
    for command in runs:
        assert "data.tokenizer=" in command and "data.train=[{path: " in command, command


@pytest.fixture
def workplace(tmp_path: Path) -> Iterator[Path]:
    """A folder that looks like the repository, so that commands write nowhere else."""
    for name in ("tools", "configs", "pltmoe"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    yield tmp_path


def test_the_commands_of_one_model_from_text_to_hugging_face(workplace: Path) -> None:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(REPOSITORY),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    run = []
    for command in COMMANDS:
        if command in RUN_BY_CI or " slurm/" in command:  # tests/slurm runs those
            continue
        tool = tool_of(command)
        done = subprocess.run(
            ["bash", "-c", f"{command} {APPENDED.get(tool, '')}"],
            cwd=workplace,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
        assert "Warning: Transformer Engine" not in done.stderr, f"{command}: of Megatron"
        run.append(tool)
    assert len(run) >= 10
    assert (workplace / "work/hf/config.json").is_file()
    assert list((workplace / "work/report").glob("*.md"))
    assert (workplace / "work/from_hf").is_dir()
    for page, prints in (
        ("README.md", r"\[.*\] \d\.\d+\n"),
        ("docs/inference.md", r"(\[.*\n){2}\d"),
    ):
        text = (REPOSITORY / page).read_text()
        (snippet,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        done = subprocess.run(
            [sys.executable, "-c", snippet], cwd=workplace, env=environment, capture_output=True,
            text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0 and re.match(prints, done.stdout), (page, done.stderr)
