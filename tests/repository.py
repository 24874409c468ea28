"""Where the repository is, and its tools run as a user runs them."""

import os
import subprocess
import sys
from pathlib import Path

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
