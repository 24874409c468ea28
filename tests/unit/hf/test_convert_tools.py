"""tools/convert_to_hf.py and convert_from_hf.py as the command line runs them."""

import pytest

from pltmoe.checkpoint.manifest import read_manifest
from pltmoe.config import write_config
from tests.repository import run_tool
from tests.unit.hf.checkpoints import model_of, run_config


def test_the_tools_go_there_and_back(plt_run, tmp_path):
    m, folder, back = model_of("plt2_expert_bias"), tmp_path / "hf", tmp_path / "back"
    arguments = ["--checkpoint", plt_run, "--output", folder]
    for more in (["--max-shard-size", "50KB"], ["--verify-only"]):
        done = run_tool("convert_to_hf.py", *arguments, *more)
        assert "Logits equal the checkpoint's on 320 tokens" in done.stdout, done.stderr
    write_config(run_config(m), tmp_path / "run.yaml")
    words = ("--model", folder, "--output", back, "--config", tmp_path / "run.yaml")
    assert f"checkpoint.load_weights={back}" in run_tool("convert_from_hf.py", *words).stdout
    assert read_manifest(back).contains == ("model",)


@pytest.mark.parametrize(
    ("tool", "arguments", "message"),
    [
        ("to", "--checkpoint nowhere --output x", "nowhere: neither"),
        ("to", "--checkpoint {run} --output nowhere --verify-only", "nowhere: not an exported mod"),
        ("from", "--model nowhere --output x --config no.yaml", "no.yaml: no such config file"),
    ],
)
def test_the_tools_say_errors_in_one_line(tool, arguments, message, plt_run):
    words = (word.format(run=plt_run) for word in arguments.split())
    done = run_tool(f"convert_{tool}_hf.py", *words)
    assert done.returncode == 1 and done.stderr.startswith(f"error: {message}")
    assert done.stderr.count("\n") == 1


def test_a_size_without_unit_is_explained(plt_run, tmp_path):
    words = ("--checkpoint", plt_run, "--output", tmp_path / "x", "--max-shard-size", "5")
    done = run_tool("convert_to_hf.py", *words)
    assert done.returncode == 2 and "expected a number and KB, MB or GB" in done.stderr
