"""Where the repository is, and its tools run as a user runs them."""

import contextlib
import io
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import TextIO
from unittest import mock

REPOSITORY = Path(__file__).resolve().parents[1]
CONFIGS = REPOSITORY / "configs"
PYTHONPATH = os.pathsep.join(filter(None, [str(REPOSITORY), os.getenv("PYTHONPATH")]))
"""For processes that tests start: this repository, whichever one is installed."""


def run_python(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run this Python in the repository, as in ``run_python("tools/plan.py", "--gpus", 8)``.

    Captures what it prints; ``variables`` of the environment are set on top of our own.
    """
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": PYTHONPATH, **variables},
        capture_output=True,
        text=True,
        timeout=600,
    )


def run_tool(
    name: str, *arguments: object, stdin: TextIO | None = None
) -> subprocess.CompletedProcess[str]:
    """Run ``tools/NAME`` as the command line does, in this process, which has imported it all."""
    words, output, errors = [name, *map(str, arguments)], io.StringIO(), io.StringIO()
    with (
        contextlib.chdir(REPOSITORY),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(errors),
        mock.patch.multiple(sys, argv=words, stdin=stdin or io.StringIO()),
    ):
        code: str | int | None = None
        try:
            runpy.run_path(f"tools/{name}", run_name="__main__")
        except SystemExit as end:
            code = end.code
    if isinstance(code, str):  # which Python prints
        code = errors.write(f"{code}\n") and 1
    return subprocess.CompletedProcess(words, code or 0, output.getvalue(), errors.getvalue())
