"""Sending a run directory to MLflow after the fact; the work of tools/sync_mlflow.py."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pltmoe.config import load_config, without_password
from pltmoe.errors import ConfigError, DataError
from pltmoe.tracking.base import EndStatus
from pltmoe.tracking.journal import VANISHED, Journal, vanished
from pltmoe.tracking.jsonl import METRICS_FILE, is_archived, read_jobs, read_lines
from pltmoe.tracking.mlflow import MLflowTracker
from pltmoe.tracking.store import one_line, quick_to_fail, usable_uri


@dataclass(frozen=True)
class Synced:
    """What a sync did."""

    where: str
    """Address of the run."""
    sent_metrics: int
    """Points sent; after a change of settings the server may have had some of them."""
    status: str
    """Status the run has now; RUNNING when nobody knows how the job ended."""


def sync(
    run_dir: Path,
    uri: str | None = None,
    status: EndStatus | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> Synced:
    """Bring MLflow up to date with ``run_dir``; doing it again sends nothing twice.

    Args:
        run_dir: directory of a run, with or without MLflow when it ran.
        uri: tracking server; default: the one the run was tracked to.
        status: how the run ended, when neither its journal nor run.json says.
        on_progress: called with the bytes of metrics files just done with.

    Raises:
        ConfigError: no usable URI.
        DataError: not a run directory, being sent by a running job, or the server does not answer.
    """
    if not (run_dir / METRICS_FILE).exists():
        raise DataError(f"{run_dir}: no {METRICS_FILE} here; give the output directory of a run")
    journal = Journal(run_dir)
    target = _target(journal, uri)
    with journal.lock(wait_s=0.0) as mine:
        if not mine:
            raise DataError(f"{run_dir}: a running job is sending this run now; nothing to do")
        _add_untracked_jobs(journal, target)
        close(journal, status)
        return _deliver(run_dir, target, on_progress)


def _target(journal: Journal, uri: str | None) -> str:
    start = journal.last_start()
    known = uri or os.environ.get("PLTMOE_MLFLOW_URI") or (start["uri"] if start else None)
    if known is None:
        raise ConfigError(f"{journal.run_dir}: was not tracked in MLflow; say where to: --uri URI")
    return usable_uri(known)


def _add_untracked_jobs(journal: Journal, uri: str) -> None:
    """Write start events for the jobs of run.json that ran without MLflow since the last start."""
    run_dir = journal.run_dir
    jobs = read_jobs(run_dir)
    if not jobs and journal.last_start() is None:
        first = next(read_lines(run_dir / METRICS_FILE), {"time": time.time()})
        jobs = [{"started": first["time"], "resume_step": None, "tags": {}}]
    if not journal.untracked(jobs[-1:]):
        return
    newest = jobs[-1]  # config.yaml has its settings
    config = load_config(run_dir / "config.yaml", [f"tracking.mlflow_uri={uri}"])
    where = {"host": "unknown", "time": newest["started"]}
    tracker = MLflowTracker(config, run_dir)
    tracker.record_start(newest["tags"], newest["resume_step"], **where)


def close(journal: Journal, status: EndStatus | None = None) -> None:
    """Write how the newest job ended, if it is known and not yet written.

    Raises:
        OSError: it cannot be written, e.g. to a full disk.
    """
    start, jobs = journal.last_start(), read_jobs(journal.run_dir)
    assert start is not None
    end: dict[str, Any] = {}
    if status is not None:
        end = {"status": status, "reason": "said by hand at a later sync"}
    elif journal.last_end() is not None:
        return
    elif jobs and jobs[-1]["status"] != "RUNNING":
        end = {"status": jobs[-1]["status"], "time": jobs[-1]["ended"]}
    elif vanished(start) or is_archived(journal.run_dir):
        end = {"status": "FAILED", "reason": VANISHED}
    if end:
        journal.append("finish", attempt=start["attempt"], **end)


def _deliver(run_dir: Path, uri: str, on_progress: Callable[[int], None] | None) -> Synced:
    quick_to_fail()
    from pltmoe.tracking.delivery import UNAVAILABLE, Delivery, RunGoneError

    delivery = Delivery(run_dir, uri, on_batch=on_progress)
    try:
        while delivery.deliver():
            pass
    except RunGoneError as error:
        raise DataError(f"{run_dir}: {error}") from None
    except UNAVAILABLE as error:
        where = without_password(uri)
        raise DataError(f"{where} does not take the run: {one_line(error)}") from None
    end = delivery.journal.last_end()
    return Synced(delivery.where(), delivery.sent_metrics, end["status"] if end else "RUNNING")
