"""An exported folder in the oldest transformers that its card names, as users may have it."""

import os
import runpy
import subprocess
import sys
import types

import pytest
import torch
from safetensors.torch import load_file

from pltmoe.hf import configuration_plt_moe
from pltmoe.hf.convert import ExportOptions, export_checkpoint
from tests.unit.hf.checkpoints import model_of, write_checkpoint
from tests.unit.hf.version_cases import outcomes

OLDEST = "5.0.0"


@pytest.fixture(scope="module")
def oldest(tmp_path_factory):
    """A folder with this release and what it needs but for torch."""
    folder = tmp_path_factory.mktemp("transformers")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-compile", "--target", str(folder)]
    done = subprocess.run([*pip, f"transformers=={OLDEST}"], capture_output=True, text=True)
    if done.returncode and "No matching distribution" not in done.stderr:
        raise AssertionError(done.stderr)
    if done.returncode:
        pytest.skip(f"no package index has transformers {OLDEST}, or none can be reached")
    return folder


def test_the_oldest_release_says_the_same(oldest, tmp_path, tokenizer_model):
    write_checkpoint(tmp_path / "run", model_of("plt3_normed"), tokenizer_model)
    options = ExportOptions(progress=False, verify=False)
    folder = export_checkpoint(tmp_path / "run", tmp_path / "hf", options).folder
    command = [sys.executable, "-m", "tests.unit.hf.version_cases", folder, tmp_path / "found.pt"]
    more = {"PYTHONPATH": os.pathsep.join([str(oldest), *sys.path]), "HF_HUB_OFFLINE": "1"}
    more["HF_MODULES_CACHE"] = str(tmp_path / "modules")
    subprocess.run(command, env=os.environ | more, check=True)
    found = torch.load(tmp_path / "found.pt")
    assert found.pop("version") == OLDEST
    expected = outcomes(folder)
    assert found.keys() == expected.keys()
    for what, value in expected.items():
        if value.is_floating_point():
            bound = 1e-12 if value.dtype == torch.float64 else 1e-5
            assert (found[what] - value).abs().max() < bound, what
        else:
            assert found[what].equal(value), what
    assert found["greedy"].equal(found["uncached"])
    stored = {name for file in folder.glob("*.safetensors") for name in load_file(file)}
    assert found.keys() > stored, "saved with other names"


def test_transformers_4_is_told_what_is_needed(monkeypatch):
    old = types.ModuleType("transformers")
    old.__version__ = "4.57.6"
    monkeypatch.setitem(sys.modules, "transformers", old)
    with pytest.raises(ImportError, match="this model needs transformers 5.0 or newer, here is 4"):
        runpy.run_path(configuration_plt_moe.__file__)
