"""tools/convert_to_hf.py and convert_from_hf.py as the command line runs them."""

import runpy
import sys

import pytest

from pltmoe.checkpoint.manifest import read_manifest
from pltmoe.config import write_config
from tests.repository import REPOSITORY
from tests.unit.hf.checkpoints import model_of, run_config


def run_tool(monkeypatch, name, *arguments):
    """Run a tool as the command line does, in this process."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    try:
        runpy.run_path(str(REPOSITORY / "tools" / name), run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise


def test_the_tools_go_there_and_back(plt_run, tmp_path, monkeypatch, capsys):
    m, folder, back = model_of("plt2_expert_bias"), tmp_path / "hf", tmp_path / "back"
    arguments = ["--checkpoint", plt_run, "--output", folder]
    run_tool(monkeypatch, "convert_to_hf.py", *arguments, "--max-shard-size", "50KB")
    assert "Logits equal the checkpoint's on 320 tokens" in capsys.readouterr().out
    run_tool(monkeypatch, "convert_to_hf.py", *arguments, "--verify-only")
    assert "Logits equal the checkpoint's on 320 tokens" in capsys.readouterr().out
    write_config(run_config(m), tmp_path / "run.yaml")
    run_tool(
        monkeypatch, "convert_from_hf.py",
        "--model", folder, "--output", back, "--config", tmp_path / "run.yaml",
    )  # fmt: skip
    assert f"checkpoint.load_weights={back}" in capsys.readouterr().out
    assert read_manifest(back).contains == ("model",)


@pytest.mark.parametrize(
    ("tool", "arguments", "message"),
    [
        (
            "convert_to_hf.py",
            ["--checkpoint", "nowhere", "--output", "x"],
            "error: nowhere: neither",
        ),
        (
            "convert_to_hf.py",
            ["--checkpoint", "{run}", "--output", "nowhere", "--verify-only"],
            "error: nowhere: not an exported model",
        ),
        (
            "convert_from_hf.py",
            ["--model", "nowhere", "--output", "x", "--config", "no.yaml"],
            "error: no.yaml: no such config file",
        ),
    ],
)
def test_the_tools_say_errors_in_one_line(tool, arguments, message, plt_run, monkeypatch):
    with pytest.raises(SystemExit) as exit:
        run_tool(monkeypatch, tool, *(a.replace("{run}", str(plt_run)) for a in arguments))
    assert str(exit.value).startswith(message)
    assert "\n" not in str(exit.value)


def test_a_size_without_unit_is_explained(plt_run, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run_tool(
            monkeypatch, "convert_to_hf.py",
            "--checkpoint", plt_run, "--output", tmp_path / "x", "--max-shard-size", "5",
        )  # fmt: skip
    assert "expected a number and KB, MB or GB" in capsys.readouterr().err
