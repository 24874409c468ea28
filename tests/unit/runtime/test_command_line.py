"""How a tool ends, as its caller sees it: exit code, streams, and no torch for that."""

import subprocess
import sys
from pathlib import Path

import pytest

from pltmoe.errors import ConfigError
from pltmoe.runtime.command_line import output_file
from tests.launch import REPOSITORY

TOOL = """
import sys
from pltmoe.errors import DataError
from pltmoe.runtime.command_line import run_tool

def main():
    {body}

try:
    run_tool(main)
finally:
    print("torch" in sys.modules)
"""


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        ("pass", 0, ""),
        ("return 3", 3, ""),
        ("raise DataError('x.bin: no such file')", 1, "error: x.bin: no such file\n"),
        ("import logging; logging.getLogger('a').info('as it is')", 0, "as it is\n"),
        ("open('/no/x')", 1, "error: /no/x: No such file or directory\n"),
        ("raise OSError(28, 'No space left on device')", 1, "error: No space left on device\n"),
        ("raise KeyboardInterrupt", 130, "interrupted\n"),
    ],
)
def test_ends_with_a_code_and_at_most_one_line(body: str, code: int, said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", TOOL.format(body=body)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr, done.stdout) == (code, said, "False\n")


@pytest.mark.parametrize("kind", ["KeyError", "ConnectionError"])
def test_a_defect_keeps_its_traceback(kind: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", TOOL.format(body=f"raise {kind}('defect')")],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "Traceback" in done.stderr and kind in done.stderr


def test_an_output_is_looked_at_before_the_work(tmp_path: Path) -> None:
    path = tmp_path / "new" / "x.json"
    assert output_file(str(path)) == path
    assert list(path.parent.iterdir()) == []
    (tmp_path / "file").touch()
    for bad in (tmp_path / "new", tmp_path / "file" / "x.json", Path("/proc/nope/x.json")):
        with pytest.raises(ConfigError, match=f"{bad}: "):
            output_file(str(bad))
