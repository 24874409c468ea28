"""What has to be downloaded before an evaluation, asked before any model is loaded."""

import os
import urllib.error
import urllib.request
from collections.abc import Iterable
from http.client import HTTPException
from pathlib import Path

from pltmoe.errors import DataError

_TRUE = {"1", "true", "yes", "on"}
_ANSWER_WITHIN_S = 5.0


def check_downloaded(datasets: Iterable[str]) -> None:
    """Return when every data set is in the cache or can be fetched.

    Raises:
        DataError: names all that are missing, and how to get them.
    """
    missing = [name for name in dict.fromkeys(datasets) if not is_cached(name)]
    if not missing:
        return
    why = _why_offline()
    if why is None:
        return
    raise DataError(
        f"these data sets of huggingface.co have to be downloaded, and {why}: "
        f"{', '.join(missing)}. On a machine with a network, run the same command with --download "
        "and HF_HOME=DIR; then take DIR here and run with HF_HOME=DIR HF_HUB_OFFLINE=1. "
        "Without a network: --tasks local --text FILE"
    )


def is_cached(dataset: str) -> bool:
    """Whether ``owner/name`` was prepared here before (for some configuration of it)."""
    wanted = dataset.replace("/", "___").lower()
    folder = _datasets_cache()
    return folder.is_dir() and any(path.name.lower() == wanted for path in folder.iterdir())


def _datasets_cache() -> Path:
    """Where the ``datasets`` library keeps what it prepared; its rules, without importing it."""
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    return Path(os.environ.get("HF_DATASETS_CACHE", home / "datasets")).expanduser()


def _why_offline() -> str | None:
    for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        if os.environ.get(variable, "").lower() in _TRUE:
            return f"{variable} is set"
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        with urllib.request.urlopen(hub, timeout=_ANSWER_WITHIN_S):
            return None
    except urllib.error.HTTPError:
        return None  # it answers
    # Also what is no answer of a web server, or no address.
    except (OSError, HTTPException, ValueError) as error:
        return f"{hub} does not answer ({getattr(error, 'reason', error)})"
