"""How a tool ends, as its caller sees it: exit code, streams, and no torch for that."""

import subprocess
import sys

import pytest

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


def test_a_defect_keeps_its_traceback() -> None:
    done = subprocess.run(
        [sys.executable, "-c", TOOL.format(body="raise KeyError('defect')")],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "KeyError: 'defect'" in done.stderr
