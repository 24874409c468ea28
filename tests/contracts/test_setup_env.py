"""tools/setup_env.sh without its hour of network: which Python it takes, and when it starts over.

The real installation is what tools/test.sh begins with. Here a shell script plays Python, because
what is tested is the order of things: find, make, install, stamp.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.repository import REPOSITORY

TOOLS = ("cat", "cp", "cut", "date", "df", "awk", "dirname", "du", "env", "flock", "grep", "ls",
         "mkdir", "mv", "printf", "pwd", "rm", "sha256sum", "sleep", "touch", "bash")  # fmt: skip

FAKE_PYTHON = """#!{bash}
self={self}
case "$*" in
    *version_info*) echo {version} ;;
    *"import venv"*) {modules} ;;
    "-m venv"*) mkdir -p "$3/bin" && cp "$self" "$3/bin/python" ;;
    "-m pip config list") echo "global.extra-index-url='https://a/simple https://b/simple'" ;;
    "-m pip install -q uv=="*) cp "$TMP_UV" .venv/bin/uv ;;
    "-m pip install"*) echo "pip $*" >> calls; exit "${{PIP_STATUS:-0}}" ;;
    "-c "*) exec {real} "$@" ;;
esac
"""
FAKE_UV = """#!/bin/sh
[ "$1" = --version ] && { echo "uv 0"; exit; }
echo "uv $UV_INDEX $*" >> calls
exit "${UV_STATUS:-0}"
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A directory with the script, a short lock, and a PATH without any Python."""
    (tmp_path / "tools").mkdir()
    shutil.copy(REPOSITORY / "tools/setup_env.sh", tmp_path / "tools")
    (tmp_path / "tools/requirements.txt").write_text("uv==0\n")
    (tmp_path / "setup.py").write_text("")
    (tmp_path / "path").mkdir()
    for tool in TOOLS:
        if found := shutil.which(tool):
            (tmp_path / "path" / tool).symlink_to(found)
    (tmp_path / "fake_uv").write_text(FAKE_UV)
    (tmp_path / "fake_uv").chmod(0o755)
    return tmp_path


def add_python(path: Path, version: str, modules: str = "true") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    bash = shutil.which("bash")
    text = FAKE_PYTHON.format(
        self=path, version=version, modules=modules, real=sys.executable, bash=bash
    )
    path.write_text(text)
    path.chmod(0o755)


def setup(checkout: Path, **env: str | None) -> subprocess.CompletedProcess[str]:
    """Run the script in ``checkout`` with nothing but its PATH and ``env`` (None: not set)."""
    given = {
        "PATH": str(checkout / "path"),
        "HOME": str(checkout / "home"),
        "TMP_UV": str(checkout / "fake_uv"),
        **env,
    }
    return subprocess.run(
        [str(checkout / "path/bash"), "tools/setup_env.sh"],
        cwd=checkout,
        env={name: value for name, value in given.items() if value is not None},
        capture_output=True,
        text=True,
        timeout=120,
    )


def calls(checkout: Path) -> list[str]:
    path = checkout / "calls"
    return path.read_text().splitlines() if path.exists() else []


def test_no_python_is_one_line_that_says_how_to_get_one(checkout: Path):
    add_python(checkout / "path/python3", "3.11")
    done = setup(checkout)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "needs Python 3.12 or 3.13, found only: 3.11" in line
    for way in ("apt-get install python3.12-venv", "pyenv install 3.12", "uv python install 3.12"):
        assert way in line
    assert not (checkout / ".venv").exists()


def test_python_too_new_for_the_pinned_wheels_is_not_taken(checkout: Path):
    add_python(checkout / "path/python3.14", "3.14")
    add_python(checkout / "path/python3", "3.14")
    done = setup(checkout)
    assert done.returncode == 2
    assert "needs Python 3.12 or 3.13, found only: 3.14" in done.stderr


def test_python_without_ensurepip_names_the_package_to_install(checkout: Path):
    broken = "echo \"ModuleNotFoundError: No module named 'ensurepip'\" >&2; exit 1"
    add_python(checkout / "path/python3.12", "3.12", modules=broken)
    done = setup(checkout)
    assert done.returncode == 2
    assert "No module named 'ensurepip'): apt-get install python3.12-venv" in done.stderr


def test_pyenv_version_is_found_behind_failing_shims(checkout: Path):
    shim = checkout / "path/python3.12"
    shim.write_text("#!/bin/sh\necho 'pyenv: python3.12: command not found' >&2\nexit 127\n")
    shim.chmod(0o755)
    add_python(checkout / "path/python3", "3.11")
    pyenv = checkout / "path/pyenv"
    pyenv.write_text(f'#!/bin/sh\n[ "$1" = root ] && echo {checkout}/pyenv\n')
    pyenv.chmod(0o755)
    add_python(checkout / "pyenv/versions/3.12.1/bin/python", "3.12")
    done = setup(checkout, HOME=None)  # as in a container; it hid what pyenv says
    assert done.returncode == 0, done.stderr
    assert f"making .venv with {checkout}/pyenv/versions/3.12.1/bin/python" in done.stderr


def test_named_python_that_does_not_fit_is_an_error(checkout: Path):
    add_python(checkout / "path/python3.12", "3.12")
    add_python(checkout / "old", "3.9")
    done = setup(checkout, PYTHON=str(checkout / "old"))
    assert done.returncode == 2
    assert f"PYTHON={checkout}/old is 3.9; it has to be one of: 3.12 3.13" in done.stderr


def test_second_call_does_nothing_and_a_changed_lock_installs_again(checkout: Path):
    add_python(checkout / "path/python3.13", "3.13")
    assert setup(checkout).returncode == 0
    (install,) = calls(checkout)
    assert install.startswith("uv https://a/simple https://b/simple pip install"), "pip's indexes"
    assert "-c tools/requirements.txt" in install and install.endswith("-e .[test,eval,deepspeed]")

    again = setup(checkout)
    assert (again.returncode, again.stderr) == (0, "") and len(calls(checkout)) == 1

    (checkout / "tools/requirements.txt").write_text("uv==0\ntorch==9\n")
    assert "updating .venv" in setup(checkout).stderr and len(calls(checkout)) == 2


def test_interrupted_set_up_starts_over(checkout: Path):
    add_python(checkout / "path/python3.12", "3.12")
    assert setup(checkout).returncode == 0
    (checkout / ".venv/.pltmoe_installed").unlink()
    (checkout / ".venv/.pltmoe_installing").touch()
    (checkout / ".venv/half_written").touch()
    done = setup(checkout)
    assert done.returncode == 0 and "not complete: making it anew" in done.stderr
    assert not (checkout / ".venv/half_written").exists()


def test_somebody_elses_environment_is_not_deleted(checkout: Path):
    add_python(checkout / "path/python3.12", "3.12")
    add_python(checkout / ".venv/bin/python", "3.9")
    done = setup(checkout)
    assert done.returncode == 2 and "move it away" in done.stderr
    assert (checkout / ".venv/bin/python").exists()


def test_pip_takes_over_when_uv_fails_and_failure_leaves_no_stamp(checkout: Path):
    add_python(checkout / "path/python3.12", "3.12")
    sleepless = checkout / "path/sleep"
    sleepless.unlink()
    sleepless.write_text("#!/bin/sh\n")
    sleepless.chmod(0o755)
    failed = setup(checkout, UV_STATUS="1", PIP_STATUS="1")
    assert failed.returncode == 2
    assert "uv failed (try 3 of 3)" in failed.stderr and "trying pip" in failed.stderr
    assert "could not be installed" in failed.stderr
    assert not (checkout / ".venv/.pltmoe_installed").exists()

    assert setup(checkout, UV_STATUS="1").returncode == 0
    assert (
        calls(checkout)[-1]
        == "pip -m pip install -c tools/requirements.txt -e .[test,eval,deepspeed]"
    )


@pytest.mark.parametrize("script", sorted(map(str, [*REPOSITORY.glob("tools/*.sh"),
                                                    REPOSITORY / ".ci/run"])))  # fmt: skip
def test_shell_scripts_parse_and_fail_honestly(script: str):
    subprocess.run(["bash", "-n", script], check=True)
    assert "set -euo pipefail" in Path(script).read_text()
