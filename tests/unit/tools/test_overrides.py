"""Overrides may stand anywhere on the command line of the tools that take them."""

import pytest

from tests.repository import run_tool

PLT2 = "configs/quickstart_plt2.yaml"


@pytest.mark.parametrize(
    ("tool", "options"),
    [
        ("pretrain.py", []),
        ("plan.py", ["--gpus", "8"]),
        ("convert_from_hf.py", ["--model", "work/hf", "--output", "work/from_hf"]),
        ("benchmark_train.py", ["--output", "work/benchmark"]),
    ],
)
def test_overrides_before_and_after_options(tool, options):
    done = run_tool(tool, "data.before=1", "--config", PLT2, "data.between=2", *options, "data.x=3")
    assert done.returncode
    for key in ("data.before", "data.between", "data.x"):
        assert f"{key}: unknown key" in done.stderr
