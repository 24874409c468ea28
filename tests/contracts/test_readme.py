"""README.md tells the truth. Here: what it names exists (unit/tools/test_readme.py runs it)."""

import re
from pathlib import Path

import pytest

from pltmoe.config import load_config
from pltmoe.config.describe import variant
from tests.contracts.source import REPOSITORY

README = REPOSITORY / "README.md"
TEXT = README.read_text(encoding="utf-8") if README.exists() else ""
FOLDERS = ("pltmoe", "configs", "slurm", "tools", "tests", "docs", ".ci")


def paths() -> list[str]:
    """Paths below our folders that the text names; {a,b} and 1..6 are spelled out as a star."""
    folders = "|".join(map(re.escape, FOLDERS))
    found = re.findall(rf"(?<![\w/.-])((?:{folders})/[\w./*{{}},-]*[\w*}}])", TEXT)
    found = [re.sub(r"\{[^}]*\}|\d\.\.\d", "*", path) for path in found]
    # X.yaml and the like stand for the reader's own file.
    return sorted({p for p in found if not re.fullmatch(r"[A-Z]+", Path(p).name.split(".")[0])})


def test_the_smallest_configuration_is_a_plt(tmp_path: Path):
    (block,) = re.findall(r"```yaml\n(.*?)```", TEXT, re.S)
    (tmp_path / "mine.yaml").write_text(block)
    assert variant(load_config(tmp_path / "mine.yaml").model) == "PLT-2"
    off = ["cross_loop_shift", "share_first_loop_kv", "gated_swa"]
    vanilla = load_config(tmp_path / "mine.yaml", [f"model.{flag}=false" for flag in off])
    assert variant(vanilla.model) == "loop-2"


@pytest.mark.parametrize("path", paths())
def test_named_path_exists(path: str):
    assert list(REPOSITORY.glob(path.rstrip("/"))), f"README.md names {path}"


def test_tests_that_the_docs_name_exist():
    for page in (REPOSITORY / "docs").glob("*.md"):
        if page.name == "log.md":  # what was, when it was written
            continue
        file = ""
        for named, name in re.findall(r"`(tests/[\w/]+\.py|…(?=::))(?:::(\w+))?", page.read_text()):
            file = file if named == "…" else named  # of the test before it
            where = REPOSITORY / file
            assert where.is_file() and f"def {name}" in where.read_text(), f"{page}: {file}::{name}"
