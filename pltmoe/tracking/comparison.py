"""Puts a comparison of runs into MLflow: a run with the report, the table on the experiment.

In the UI the experiment then opens with the table as its description, above the runs compared.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pltmoe.config import without_password
from pltmoe.errors import DataError
from pltmoe.tracking.mlflow import page_of
from pltmoe.tracking.store import one_line, quick_to_fail, usable_uri

RUN_NAME = "comparison"
KIND_TAG = "pltmoe.kind"
NOTE_TAG = "mlflow.note.content"
_OF_TAG = "pltmoe.compares"
_LONGEST_EXPERIMENT_TAG = 5000

log = logging.getLogger(__name__)


def log_comparison(
    uri: str,
    experiment: str,
    names: Sequence[str],
    files: Sequence[Path],
    note: str,
) -> str:
    """Create or renew the comparison of the runs ``names``; return where to look.

    Args:
        uri: tracking server or store.
        experiment: where the compared runs are.
        names: of the runs compared; a later comparison of the same ones replaces this one.
        files: the report, its pictures and tables.
        note: Markdown; becomes the description of the experiment, and of the comparison's run.

    Raises:
        DataError: the server does not answer, or refuses.
        ConfigError: ``uri`` is nothing MLflow can use.
    """
    uri = usable_uri(uri)
    quick_to_fail()
    # Only this function pays for mlflow.
    from mlflow.tracking import MlflowClient

    from pltmoe.tracking.delivery import UNAVAILABLE, experiment_id_of

    client = MlflowClient(uri)
    try:
        experiment_id = experiment_id_of(client, uri, experiment)
        run_id = _run(client, experiment_id, ", ".join(names).replace("'", ""))
        for path in files:
            client.log_artifact(run_id, str(path), "report")
        about = {
            NOTE_TAG: note,
            KIND_TAG: RUN_NAME,
            "mlflow.source.name": "compare_runs.py",
        }
        for key, value in about.items():
            client.set_tag(run_id, key, _cut(value))
        client.set_experiment_tag(experiment_id, NOTE_TAG, _cut(note))
        client.set_terminated(run_id, "FINISHED")
    except UNAVAILABLE as error:
        raise DataError(
            f"{without_password(uri)}: the comparison could not be logged ({one_line(error)}); the "
            "report is written, so run the same command again when MLflow answers"
        ) from None
    return page_of(without_password(uri), experiment_id)


def _run(client: Any, experiment_id: str, compared: str) -> str:
    same = f"tags.`{_OF_TAG}` = '{compared}'"
    if found := client.search_runs([experiment_id], same, max_results=1):
        return found[0].info.run_id
    return client.create_run(experiment_id, run_name=RUN_NAME, tags={_OF_TAG: compared}).info.run_id


def _cut(text: str) -> str:
    """Return whole lines of ``text`` that MLflow takes as a tag."""
    if len(text) <= _LONGEST_EXPERIMENT_TAG:
        return text
    end = "\n\nMore in the report, among the artifacts of the run 'comparison'."
    return text[: _LONGEST_EXPERIMENT_TAG - len(end)].rpartition("\n")[0] + end
