"""Sending a run directory to MLflow after the fact; the work of tools/sync_mlflow.py."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pltmoe.config import load_config, without_password
from pltmoe.errors import ConfigError, DataError
from pltmoe.tracking.base import EndStatus
from pltmoe.tracking.journal import Journal, vanished
from pltmoe.tracking.jsonl import METRICS_FILE, read_lines
from pltmoe.tracking.mlflow import MLflowTracker
from pltmoe.tracking.sender import VANISHED, quick_to_fail
from pltmoe.tracking.store import usable_uri


@dataclass(frozen=True)
class Synced:
    """What a sync did."""

    where: str
    """Address of the run."""
    sent_metrics: int
    """Points that the server did not have."""
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
        status: how the run ended, when its journal does not say.
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
        if journal.last_start() is None:
            _start_from_config(run_dir, target)
        _close(journal, status)
        return _deliver(run_dir, target, on_progress)


def _target(journal: Journal, uri: str | None) -> str:
    start = journal.last_start()
    known = uri or os.environ.get("PLTMOE_MLFLOW_URI") or (start["uri"] if start else None)
    if known is None:
        raise ConfigError(f"{journal.run_dir}: was not tracked in MLflow; say where to: --uri URI")
    return usable_uri(known)


def _start_from_config(run_dir: Path, uri: str) -> None:
    config = load_config(run_dir / "config.yaml", [f"tracking.mlflow_uri={uri}"])
    lines = list(read_lines(run_dir / METRICS_FILE))
    tracker = MLflowTracker(config, run_dir)
    began = {"time": lines[0]["time"]} if lines else {}
    tracker.record_start({}, {}, resume_step=None, host="unknown", **began)
    if lines and lines[-1]["step"] >= config.train.steps:
        ended = {"time": lines[-1]["time"], "attempt": tracker.attempt}
        Journal(run_dir).append("finish", status="FINISHED", **ended)


def _close(journal: Journal, status: EndStatus | None) -> None:
    start = journal.last_start()
    assert start is not None
    if status is not None:
        reason = "said by hand at a later sync"
        journal.append("finish", status=status, reason=reason, attempt=start["attempt"])
    elif journal.last_end() is None and vanished(start):
        journal.append("finish", status="FAILED", reason=VANISHED, attempt=start["attempt"])


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
        text = " ".join(str(error).split())[:300]
        raise DataError(f"{without_password(uri)} does not take the run: {text}") from None
    end = delivery.journal.last_end()
    return Synced(delivery.where(), delivery.sent_metrics, end["status"] if end else "RUNNING")
