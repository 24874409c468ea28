"""README.md tells the truth: what it names exists, and what it says to run is run by a test."""

import re
import shlex
from pathlib import Path

import pytest

from pltmoe.config import load_config
from pltmoe.config.describe import variant
from tests.contracts.source import REPOSITORY

README = REPOSITORY / "README.md"
TEXT = README.read_text(encoding="utf-8") if README.exists() else ""
FOLDERS = ("pltmoe", "configs", "slurm", "tools", "tests", "docs", ".ci")
BLOCKS = re.findall(r"```(?:bash|sh|shell|console)\n(.*?)```", TEXT, re.S)
# What continuous integration runs as it stands.
RUN_BY_CI = [
    REPOSITORY / ".ci/run",
    REPOSITORY / "tools/quickstart.sh",
    REPOSITORY / "tools/test.sh",
]


def commands() -> list[str]:
    """Command lines of the shell blocks that run a script of ours."""
    lines = "\n".join(BLOCKS).replace("\\\n", " ").splitlines()
    lines = [line.strip().removeprefix("$ ") for line in lines]
    return [line for line in lines if re.search(r"(^|\s)(tools/|\.ci/)\S+", line)
            and not line.startswith("#")]  # fmt: skip


def paths() -> list[str]:
    """Paths below our folders that the text names; {a,b} and 1..6 are spelled out as a star."""
    folders = "|".join(map(re.escape, FOLDERS))
    found = re.findall(rf"(?<![\w/.-])((?:{folders})/[\w./*{{}},-]*[\w*}}])", TEXT)
    found = [re.sub(r"\{[^}]*\}|\d\.\.\d", "*", path) for path in found]
    # X.yaml and the like stand for the reader's own file.
    return sorted({p for p in found if not re.fullmatch(r"[A-Z]+", Path(p).name.split(".")[0])})


def script_of(command: str) -> str:
    found = re.search(r"(?:^|\s)((?:tools/|\.ci/)[\w./-]+)", command)
    assert found
    return found[1]


def test_the_smallest_configuration_is_a_plt(tmp_path: Path):
    (block,) = re.findall(r"```yaml\n(.*?)```", TEXT, re.S)
    (tmp_path / "mine.yaml").write_text(block)
    assert variant(load_config(tmp_path / "mine.yaml").model) == "PLT-2"
    off = ["cross_loop_shift", "share_first_loop_kv", "gated_swa"]
    vanilla = load_config(tmp_path / "mine.yaml", [f"model.{flag}=false" for flag in off])
    assert variant(vanilla.model) == "loop-2"


def test_readme_has_commands():
    assert any("tools/quickstart.sh" in command for command in commands())
    assert any("tools/test.sh" in command for command in commands())


@pytest.mark.parametrize("path", paths())
def test_named_path_exists(path: str):
    assert list(REPOSITORY.glob(path.rstrip("/"))), f"README.md names {path}"


@pytest.mark.parametrize("command", commands())
def test_command_is_run_by_a_test_and_its_options_exist(command: str):
    script = script_of(command)
    source = (REPOSITORY / script).read_text(encoding="utf-8")
    module = script.removesuffix(".py").replace("/", ".")
    elsewhere = [*(REPOSITORY / "tests").rglob("*.py"), *RUN_BY_CI]
    texts = [p.read_text() for p in elsewhere if p.exists() and p != Path(__file__)]
    is_run = any(script in text or module in text for text in texts) or script == ".ci/run"
    name = Path(script).name
    assert is_run or any(f'"{name}"' in text for text in texts), f"nothing runs {script}"
    for option in re.findall(r"(?<=\s)--[a-z][a-z-]+", command.split(script)[1]):
        # tools/test.sh hands its arguments on to pytest.
        assert option in source or script == "tools/test.sh", f"{script} has no {option}"
    for word in shlex.split(command, comments=True):
        if word.startswith("configs/") and "*" not in word and not re.search(r"\b[A-Z]+\b", word):
            assert (REPOSITORY / word).exists(), word
