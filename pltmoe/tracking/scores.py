"""Adds the scores of an evaluation to a run that MLflow has; training never calls this."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from pltmoe.config import without_password
from pltmoe.errors import ConfigError, DataError
from pltmoe.tracking.journal import Journal
from pltmoe.tracking.jsonl import sync_command
from pltmoe.tracking.store import one_line, quick_to_fail, usable_uri


def find_run(run: str, uri: str | None) -> tuple[str, str]:
    """Return (tracking URI, run id) of a run id or a run directory that was tracked.

    Raises:
        ConfigError: no URI, or the directory was never sent to it.
    """
    if not Path(run).is_dir():
        if uri is None:
            raise ConfigError(f"--run {run}: is no run directory, so say where it is: --mlflow-uri")
        return usable_uri(uri), run
    journal = Journal(Path(run))
    start = journal.last_start()
    known = uri or (start["uri"] if start else None)
    run_id = journal.state(usable_uri(known)).get("run_id") if known else None
    if known is None or run_id is None:
        raise ConfigError(
            f"--run {run}: is not in MLflow yet; first: {sync_command(run)} --uri URI"
        )
    return usable_uri(known), run_id


def log_scores(
    uri: str, run_id: str, metrics: Mapping[str, float], files: Sequence[Path], step: int = 0
) -> None:
    """Log metrics and files (under ``evaluation/``); the status of the run stays as it is.

    Raises:
        DataError: the server does not answer, or has no such run.
    """
    quick_to_fail()
    from pltmoe.tracking.delivery import UNAVAILABLE, add_scores

    try:
        add_scores(uri, run_id, metrics, files, step)
    except UNAVAILABLE as error:
        raise DataError(
            f"{without_password(uri)} does not take the scores ({one_line(error)}); they are in "
            f"{files[0]}: run again with --log-only when it answers"
        ) from None
