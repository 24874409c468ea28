"""Which software made a run: package versions and the commit of this source tree."""

import hashlib
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import pltmoe

_SOURCES = ("configs", "pltmoe", "tests", "tools")
_PACKAGES = ("torch", "megatron-core", "transformer-engine", "deepspeed", "transformers", "mlflow")


def versions() -> dict[str, str]:
    """Return name -> version of Python and of the packages that matter and are installed."""
    found = {"python": platform.python_version(), "pltmoe": pltmoe.__version__}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """Return the git commit of the source tree, or ``unknown``.

    A tree that was changed is COMMIT-dirty-HASH, the hash that of the changes; one of which git
    cannot tell is COMMIT-unknown. Where sources travel without their repository, PLTMOE_COMMIT
    says what they are.
    """
    if told := os.environ.get("PLTMOE_COMMIT"):
        return told
    root = Path(pltmoe.__file__).resolve().parents[1]
    if not (root / ".git").exists():  # installed elsewhere: any repository above is not ours
        return "unknown"
    revision = _git(root, "rev-parse", "--short=12", "HEAD")
    if not revision:
        return "unknown"
    changes = _git(root, "diff", "HEAD", "--", *_SOURCES)
    if changes is None:
        return f"{revision.decode()}-unknown"
    if not changes:
        return revision.decode()
    return f"{revision.decode()}-dirty-{hashlib.sha256(changes).hexdigest()[:6]}"


def _git(root: Path, *arguments: str) -> bytes | None:
    """Return what git says (a difference may be in any encoding), None if it fails."""
    # Whoever runs these sources trusts their repository, also another user's (in a container).
    command = ["git", "-c", f"safe.directory={root}", *arguments]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
