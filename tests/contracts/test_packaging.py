"""setup.py, the pins and what a built package contains."""

import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import packages_distributions, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import pltmoe
from tests.contracts.source import PACKAGE, REPOSITORY, TOOLS, imports

LOCK = REPOSITORY / "tools/requirements.txt"
THROUGH = {
    # Only to catch what MLflow and transformers let through from them; their own bounds hold.
    "huggingface_hub": "transformers",
    "requests": "mlflow",
    "sqlalchemy": "mlflow",
    "pynvml": "nvidia-ml-py",
    # Comes with torch where it can run, in the version that fits.
    "triton": "torch",
}


def read_setup() -> dict:
    """Arguments of ``setup()``, without building anything."""
    captured: dict = {}
    source = (REPOSITORY / "setup.py").read_text()
    source = source.replace("from setuptools import find_packages, setup", "")
    names = {
        "__file__": str(REPOSITORY / "setup.py"),
        "setup": lambda **arguments: captured.update(arguments),
        "find_packages": lambda **_: [],
    }
    exec(compile(source, "setup.py", "exec"), names)
    return captured


def pins() -> dict[str, str]:
    lines = [line for line in LOCK.read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9.-]+==[^ ;]+", line) for line in lines), "only name==version"
    found = dict(line.split("==") for line in lines)
    assert len(found) == len(lines), "a package is pinned twice"
    return {canonicalize_name(name): pin for name, pin in found.items()}


SETUP = read_setup()
EXTRAS = SETUP["extras_require"]
RANGES = [*SETUP["install_requires"], *(item for extra in EXTRAS.values() for item in extra)]


@pytest.mark.parametrize("text", RANGES)
def test_every_range_holds_its_pin(text: str):
    requirement = Requirement(text)
    pin = pins()[canonicalize_name(requirement.name)]
    assert requirement.specifier.contains(pin), f"{text} but pinned {pin}"
    assert not any(s.operator == "==" for s in requirement.specifier), "pins belong into the lock"


def test_versions_that_were_agreed_on():
    expected = {"torch": "2.11.0", "megatron-core": "0.19.2", "deepspeed": "0.19.8"}
    assert {name: pins()[name] for name in expected} == expected
    assert {"te", "deepspeed", "eval", "test"} <= set(EXTRAS)
    names = {canonicalize_name(Requirement(text).name) for text in RANGES}
    assert "apex" not in names | set(pins()), "apex on PyPI is not NVIDIA's"


def test_this_environment_is_the_locked_one():
    locked = pins()
    for text in [*SETUP["install_requires"], *EXTRAS["test"], *EXTRAS["eval"]]:
        name = canonicalize_name(Requirement(text).name)
        assert version(name) == locked[name]


def test_a_container_gets_everything_but_what_the_image_brings():
    script = (REPOSITORY / "slurm/container_packages.sh").read_text()
    listed = "|".join(re.findall(r"^packages\+?='\|?(.+)'$", script, re.MULTILINE)).split("|")
    ranges = [*SETUP["install_requires"], *EXTRAS["deepspeed"]]
    needed = {canonicalize_name(Requirement(text).name) for text in ranges}
    assert {canonicalize_name(name) for name in listed} == needed - {"torch", "numpy"}
    lines = LOCK.read_text().splitlines()
    assert not [name for name in listed if not any(x.startswith(f"{name}==") for x in lines)]


def test_everything_imported_is_declared():
    declared = {canonicalize_name(Requirement(text).name) for text in RANGES}
    installed = packages_distributions()
    for path in [*PACKAGE, *TOOLS]:
        for name in imports(path):
            top = name.split(".")[0]
            if top in sys.stdlib_module_names or top in ("pltmoe", "tools"):
                continue
            given = {canonicalize_name(d) for d in installed.get(top, [top])}
            given.add(THROUGH.get(top, top))
            assert given & declared, f"{path} imports {name}: not in setup.py"


def test_built_package_has_everything_it_needs(tmp_path: Path):
    for item in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(REPOSITORY / item, tmp_path)
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(REPOSITORY / "pltmoe", tmp_path / "pltmoe", ignore=ignore)
    build = "from setuptools.build_meta import build_wheel; build_wheel('out')"
    subprocess.run([sys.executable, "-c", build], cwd=tmp_path, check=True, capture_output=True)
    (wheel,) = (tmp_path / "out").glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {
        str(path.relative_to(REPOSITORY))
        for path in (REPOSITORY / "pltmoe").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert sources <= names
    assert f"pltmoe-{pltmoe.__version__}-" in wheel.name
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_license_is_apache_2():
    text = (REPOSITORY / "LICENSE").read_text()
    assert "Apache License" in text and "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text and SETUP["license"] == "Apache-2.0"


@pytest.mark.xdist_group("groups")
def test_groups_of_tests_stay_on_one_worker(request: pytest.FixtureRequest):
    """Ranks, servers and clusters are made once per group; pytest 9.2 hid the groups from xdist."""
    if not request.config.getoption("loadgroup", False):
        pytest.skip("the tests are not spread over processes by group")
    assert request.node.nodeid.endswith("@groups")
