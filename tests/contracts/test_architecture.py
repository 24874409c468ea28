"""What may import what, what the model may not know, and how large a piece of code may grow."""

import ast
import re
from pathlib import Path

import pytest

from tests.contracts.source import PACKAGE, REPOSITORY, TOOLS, imports, name_of, tree
from tests.repository import run_python

# config -> model -> parallel -> engines -> train -> tools; the others are leaves that train uses.
MAY_IMPORT = {
    "errors": set(),
    "config": {"errors"},
    "model": {"config", "errors"},
    "parallel": {"config", "errors", "model"},
    "plan": {"config", "errors", "parallel"},
    "engines": {"config", "errors", "model", "parallel", "runtime"},
    "data": {"config", "errors", "runtime"},
    "runtime": {"config", "errors"},
    "checkpoint": {"config", "errors", "runtime"},
    "tracking": {"config", "errors"},
    # Reads what tracking has written, and names scores as evaluation does.
    "reports": {"config", "errors", "evaluation", "parallel", "tracking"},
    "evaluation": {"data", "errors"},  # of exported models: needs nothing that trains
    "hf": {"config", "errors", "model"},
    "inference": {"config", "errors", "model"},
    "train": {"config", "errors", "model", "parallel", "engines", "data", "runtime", "checkpoint",
              "tracking"},
}  # fmt: skip
# Beyond the table, with the reason.
ALSO = {
    # Two verbs that go from a checkpoint to Hugging Face and back, with the tokenizer of the data.
    "pltmoe/hf": {"checkpoint", "data", "runtime"},
    # Loads exported folders by the name table.
    "pltmoe/inference": {"hf"},
}
LONG_FILES = {
    # Travels with exported weights as one file, because transformers loads it alone.
    "pltmoe/hf/modeling_plt_moe.py": 1330,
}
LONG_FUNCTIONS: dict[str, int] = {}
PACKAGE_IDS = [name_of(path) for path in PACKAGE]


def part_of(path: Path) -> str:
    parts = path.relative_to(REPOSITORY / "pltmoe").parts
    return parts[0] if len(parts) > 1 else path.stem


@pytest.mark.parametrize("path", PACKAGE, ids=PACKAGE_IDS)
def test_imports_go_one_way(path: Path):
    part = part_of(path)
    if part == "__init__":
        return
    allowed = MAY_IMPORT[part] | ALSO.get(f"pltmoe/{part}", set()) | {part}
    for name in imports(path):
        if name.startswith("pltmoe."):
            other = name.split(".")[1]
            assert other in allowed or other == "__version__", f"{name_of(path)} imports {name}"
        assert not name.startswith(("tools", "tests")), f"{name_of(path)} imports {name}"


FORBIDDEN_IN_MODEL = {
    "parallel_state", "all_reduce", "all_gather", "all_gather_into_tensor", "all_to_all",
    "all_to_all_single", "reduce_scatter", "reduce_scatter_tensor", "broadcast", "barrier", "send",
    "recv", "isend", "irecv", "batch_isend_irecv", "init_process_group", "new_group", "get_rank",
    "get_world_size",
}  # fmt: skip


@pytest.mark.parametrize("path", [p for p in PACKAGE if part_of(p) == "model"], ids=name_of)
def test_model_names_no_process_group_and_calls_no_collective(path: Path):
    """Where things run is for parallel/ to know; ``pg_collection`` is only handed through."""
    for name in imports(path):
        assert not name.startswith("torch.distributed"), f"imports {name}"
        assert "parallel_state" not in name, f"imports {name}"
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Attribute | ast.Name):
            name = node.attr if isinstance(node, ast.Attribute) else node.id
            assert name not in FORBIDDEN_IN_MODEL, f"{name} in line {node.lineno}"
        if isinstance(node, ast.Attribute) and node.attr == "distributed":
            raise AssertionError(f"torch.distributed in line {node.lineno}")


@pytest.mark.parametrize("file", ["reference.py", "cross_loop.py"])
def test_what_newcomers_read_needs_only_torch(file: str):
    allowed = ("torch", "dataclasses", "pltmoe.config.model", "pltmoe.model.cross_loop")
    for name in imports(REPOSITORY / "pltmoe/model" / file):
        assert name.startswith(allowed), f"{file} imports {name}"


@pytest.mark.parametrize("path", PACKAGE, ids=PACKAGE_IDS)
def test_one_file_each_names_what_belongs_to_it(path: Path):
    """Transformer Engine: layer_specs.py. parallel_state: groups.py."""
    homes = {
        "transformer_engine": ("pltmoe/model/layer_specs.py", "pltmoe/runtime/"),
        "megatron.core.extensions.transformer_engine": ("pltmoe/model/layer_specs.py",),
        "megatron.core.parallel_state": ("pltmoe/parallel/groups.py",),
        "deepspeed": tuple(
            f"pltmoe/engines/deepspeed{part}.py" for part in ("", "_offload", "_state")
        ),
        "mlflow": ("pltmoe/tracking/", "pltmoe/reports/runs.py"),
        "transformers": ("pltmoe/hf/",),
    }
    for name in imports(path):
        for what, home in homes.items():
            if name == what or name.startswith(what + "."):
                assert name_of(path).startswith(home), f"{name_of(path)} imports {name}"


@pytest.mark.parametrize("path", PACKAGE + TOOLS, ids=name_of)
def test_size_and_name(path: Path):
    lines = path.read_text(encoding="utf-8").count("\n")
    assert lines <= LONG_FILES.get(name_of(path), 500), f"{lines} lines"
    assert path.stem not in {"utils", "util", "common", "helpers", "misc"}
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno:
            length = node.end_lineno - node.lineno + 1
            limit = LONG_FUNCTIONS.get(f"{name_of(path)}:{node.name}", 100)
            assert length <= limit, f"{node.name}: {length} lines"


@pytest.mark.parametrize("path", PACKAGE, ids=PACKAGE_IDS)
def test_package_logs_and_does_not_print(path: Path):
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print", f"print in line {node.lineno}"


@pytest.mark.parametrize("path", PACKAGE + TOOLS, ids=name_of)
def test_text_is_utf_8_whatever_the_locale(path: Path):
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            opens = re.search(r"(?<!\bos)\.(read_text|write_text|open)$|^open$", name)
            binary = any(re.match(r"'[rwax+]*b", ast.unparse(mode)) for mode in node.args)
            given = any(keyword.arg == "encoding" for keyword in node.keywords)
            assert not opens or binary or given, f"line {node.lineno}: {name} has no encoding"


EVERY_MODULE = """
import importlib, pkgutil, sys
from importlib.machinery import PathFinder

MISSING = {"transformer_engine", "transformer_engine_torch", "deepspeed", "mlflow", "apex",
           "lm_eval", "accelerate", "pytest", "hypothesis"}

class WithoutOptionalPackages(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.split(".")[0] not in MISSING:
            return PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutOptionalPackages
from pltmoe.runtime.cpu import stand_in_for_cuda
stand_in_for_cuda()
import pltmoe
for module in pkgutil.walk_packages(pltmoe.__path__, "pltmoe."):
    try:
        importlib.import_module(module.name)
        print(module.name)
    except ModuleNotFoundError as missing:
        print(module.name, "needs", missing.name.split(".")[0], sep="_")
"""
# Modules that exist to talk to one optional package, and are imported only when it is asked for.
NEEDS = {
    "pltmoe.tracking.delivery": "mlflow",  # these two live in the process that sends to MLflow
    "pltmoe.tracking.system": "mlflow",
    "pltmoe.engines.deepspeed": "deepspeed",
}


def test_every_module_imports_without_gpu_and_optional_packages():
    done = run_python("-c", EVERY_MODULE, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
    names = {
        name_of(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for path in PACKAGE
    } - {"pltmoe"}
    may_fail = {name: f"{name}_needs_{package}" for name, package in NEEDS.items()}
    found = set(done.stdout.split())
    assert {may_fail.get(n, n) if n not in found else n for n in names} == found
