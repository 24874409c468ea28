"""One job at a time works on a run: two would delete each other's checkpoints and metrics."""

import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pltmoe.errors import CheckpointError
from pltmoe.runtime.distributed import main_only

logger = logging.getLogger(__name__)

LOCK = ".in_use"
PATIENCE_S = 300.0
"""A job that was requeued may meet its former self, which is still ending; a file server gives up
the locks of a machine that is gone after minutes."""


@contextmanager
def run_folder(folder: Path, patience_s: float = PATIENCE_S) -> Iterator[None]:
    """Make ``folder`` and hold it, on rank 0, until the block ends; all ranks call it.

    The lock ends with its process, however that ends. It works across machines where the file
    system has POSIX locks; where it has none a warning says so.

    Raises:
        CheckpointError: another job holds it for ``patience_s``, or it cannot be made.
    """
    held = main_only(lambda: _hold(folder, patience_s))
    try:
        yield
    finally:
        if held is not None:
            os.close(held)


def _hold(folder: Path, patience_s: float) -> int:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise CheckpointError(f"train.output_dir ({folder}): {error.strerror}") from error
    began = said = time.monotonic()
    while not _try(file, folder):
        owner = os.pread(file, 1000, 0).decode(errors="replace").strip() or "unknown"
        if time.monotonic() - began >= patience_s:
            os.close(file)
            raise CheckpointError(
                f"train.output_dir ({folder}) is in use by another job ({owner}): wait until it "
                "has ended, or choose another folder"
            )
        if said == began or time.monotonic() - said > 60:
            said = time.monotonic()
            logger.warning("waiting for another job on %s to end (%s)", folder, owner)
        time.sleep(0.5)
    job = os.environ.get("SLURM_JOB_ID")
    owner = f"process {os.getpid()} on {socket.gethostname()}" + (f", job {job}" if job else "")
    os.ftruncate(file, 0)
    os.pwrite(file, f"{owner}\n".encode(), 0)
    return file


def _try(file: int, folder: Path) -> bool:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        logger.warning(
            "%s cannot be locked (%s): start no second job on it", folder, error.strerror
        )
    return True
