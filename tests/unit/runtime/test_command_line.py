"""How a tool ends, as its caller sees it: exit code, streams, and no torch for that."""

import subprocess
import sys
from pathlib import Path

import pytest

from pltmoe.errors import ConfigError
from pltmoe.runtime.command_line import output_file
from tests.repository import REPOSITORY, run_python

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
        (
            "sys.argv.append('caf\\udce9'); sys.argv[1].encode()",
            1,
            "error: 'caf\\udce9': no UTF-8, which what writes or reads it needs; rename it\n",
        ),
    ],
)
def test_ends_with_a_code_and_at_most_one_line(body: str, code: int, said: str) -> None:
    done = run_python("-c", TOOL.format(body=body))
    assert (done.returncode, done.stderr, done.stdout) == (code, said, "False\n")


def test_several_processes_of_torchrun_are_refused() -> None:
    done = run_python("tools/plan.py", TORCHELASTIC_RUN_ID="none", WORLD_SIZE="2")
    said = "error: torchrun started 2 processes of plan.py, which is one: use python\n"
    assert (done.returncode, done.stderr, done.stdout) == (1, said, "")


@pytest.mark.parametrize("kind", ["KeyError", "ConnectionError", "BrokenPipeError"])
def test_a_defect_keeps_its_traceback(kind: str) -> None:
    done = run_python("-c", TOOL.format(body=f"raise {kind}('defect')"))
    assert done.returncode == 1
    assert "Traceback" in done.stderr and kind in done.stderr


def test_what_is_printed_need_not_be_read_nor_fit_the_terminal() -> None:
    """``| head -1``, and a text that a terminal has no letters for: both ended in a traceback."""
    body = "import os; print('first', flush=True); os.read(0, 1); print('second')"
    process = subprocess.Popen(
        [sys.executable, "-c", TOOL.format(body=body)],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"first\n"
    process.stdout.close()
    _, said = process.communicate(b"x")
    assert (process.returncode, said) == (141, b"")
    for show in ("\u03c0", "a path: \udce9"):
        tool = TOOL.format(body=f"print({show!a})")
        done = run_python("-c", tool, PYTHONIOENCODING="ascii")
        assert (done.returncode, done.stderr) == (0, "")
        assert ascii(show)[1:-1] in done.stdout


def test_streams_may_be_closed(tmp_path: Path) -> None:
    """Each tool ended at its start, without a word; a file would have got what is printed."""
    body = f"file = open({str(tmp_path / 'x')!r}, 'w'); print(file.fileno() > 2, file=file)"
    shell = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh"]
    command = [*shell, sys.executable, "-c", TOOL.format(body=body)]
    assert subprocess.run(command, cwd=REPOSITORY).returncode == 0
    assert (tmp_path / "x").read_text() == "True\n"


def test_a_tool_needs_no_docstrings() -> None:
    """PYTHONOPTIMIZE=2 takes them away."""
    assert run_python("-OO", "tools/plan.py", "--help").returncode == 0


def test_an_output_is_looked_at_before_the_work(tmp_path: Path) -> None:
    path = tmp_path / "new" / "x.json"
    assert output_file(str(path)) == path
    assert list(path.parent.iterdir()) == []
    (tmp_path / "file").touch()
    for bad in (tmp_path / "new", tmp_path / "file" / "x.json", Path("/proc/nope/x.json")):
        with pytest.raises(ConfigError, match=f"{bad}: "):
            output_file(str(bad))
