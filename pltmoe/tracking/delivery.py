"""Brings an MLflow server up to date with a run directory, as often as needed, never twice.

Safe to repeat and to interrupt anywhere:

- the run is found again by its id or, when the answer to "create" was lost, by a key in its tags;
  an empty double that such a call made after all is deleted when the job ends;
- after a failure the server is asked again what it has: it may be back with an older database;
- a point is sent when its step is later than the newest one that the server has of that metric, so
  steps done again after a resume do not double (MLflow keeps what it got first);
- steps done again with other settings are sent again (legs.py): MLflow keeps both points, and a
  tag says which were given up;
- what was sent before is sent again unchanged (the answer to a batch was lost; a branch is not yet
  as long as the one it replaces), and the server drops equal points.

This module is imported by processes that send, never by the one that trains.
"""

import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import batched
from pathlib import Path
from typing import Any

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read when mlflow is imported

import requests
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from mlflow.utils.validation import (
    MAX_ENTITY_KEY_LENGTH,
    MAX_METRICS_PER_BATCH,
    MAX_PARAM_VAL_LENGTH,
    MAX_PARAMS_TAGS_PER_BATCH,
    MAX_TAG_VAL_LENGTH,
)
from sqlalchemy.exc import SQLAlchemyError

from pltmoe.config import without_password
from pltmoe.tracking.journal import Journal, end_of_last_start
from pltmoe.tracking.jsonl import (
    METRICS_FILE,
    NOT_METRICS,
    SYSTEM_METRICS_FILE,
    decode_line,
    is_archived,
)
from pltmoe.tracking.legs import BRANCHES_TAG, branches, branches_tag, changes, first_values
from pltmoe.tracking.store import artifact_location, run_link

UNAVAILABLE = (MlflowException, requests.RequestException, SQLAlchemyError, OSError)
"""What talking to a server or its store can raise."""
RUN_KEY_TAG = "pltmoe.run_key"
EXPERIMENT_KIND = ("mlflow.experimentKind", "custom_model_development")
"""Says that this is model training. Releases of the MLflow 3 UI that ask the experiment open its
training view by it; 3.17 asks the browser and the link instead (``store.run_link``)."""
_LINES_PER_READ = 200

log = logging.getLogger(__name__)


class RunGoneError(Exception):
    """Someone deleted the run in MLflow: nothing more is to be sent to it."""


class Delivery:
    """One run directory and one server; ``on_batch`` hears of the bytes done with (progress)."""

    def __init__(
        self, run_dir: Path, uri: str, on_batch: Callable[[int], None] | None = None
    ) -> None:
        self._on_batch = on_batch or (lambda done_bytes: None)
        self.journal = Journal(run_dir)
        self.uri = uri
        self.sent_metrics = 0
        self._client: MlflowClient | None = None
        self._run_id: str | None = None
        self._asked = False  # what the server has
        self._state: dict[str, Any] = {}
        self._newest: dict[str, tuple[int, int]] = {}  # metric -> step and ms since 1970
        self._feeds = _feeds(run_dir)
        self._events_done = 0

    def deliver(self) -> bool:
        """Send everything that is on disk by now; True when there was something.

        Raises:
            RunGoneError: the run was deleted on the server.
            Exception: one of UNAVAILABLE; what was acknowledged before is not sent again.
        """
        try:
            return self._deliver()
        except UNAVAILABLE:
            self._asked = False
            raise

    def _deliver(self) -> bool:
        events = self.journal.events()  # before the metrics: a finish event comes after the last
        starts = _starts(events)
        if not starts or self._is_of_another_run(starts[0]):
            return False
        if not self._asked:
            self._open_run(starts[0])
        new = events[self._events_done :]
        moved = self._send_starts(starts, _starts(new))
        moved |= self._send_metrics()
        moved |= self._send_artifacts(new)
        self._set_status(events, new)
        self._events_done = len(events)
        return moved

    def bytes_waiting(self) -> int:
        """Size of the lines not yet acknowledged (a torn line at the end counts)."""
        if self._overtaken():
            return 0  # they are a later job's to send
        return sum(feed.bytes_waiting() for feed in self._feeds)

    def _overtaken(self) -> bool:
        """Whether the lines are by now those of a later run, or of a job without MLflow."""
        start = self.journal.last_start()
        return start is None or self._is_of_another_run(start) or self.journal.overtaken()

    def _is_of_another_run(self, start: dict[str, Any]) -> bool:
        """Whether a run began in this folder after the one that was sent."""
        return self._state.get("run_key", start["run_key"]) != start["run_key"]

    def _open_run(self, start: dict[str, Any]) -> None:
        if self._client is None:
            self._client = MlflowClient(tracking_uri=self.uri)
        self._state = self.journal.state(self.uri)
        known = self._state.get("run_id")
        run = self._find(known, start) or self._create(start)
        run_id = run.info.run_id
        if run.info.lifecycle_stage != "active":
            raise RunGoneError(f"run {run_id} was deleted in MLflow; not sending to it")
        if run_id != known:
            self._state = {}  # of what another run was sent, this one has nothing
        self._state |= {"run_id": run_id, "experiment_id": run.info.experiment_id}
        self._state["run_key"] = start["run_key"]
        self.journal.save_state(self.uri, self._state)
        has = {m.key: (m.step, m.timestamp) for m in run.data.to_proto().metrics}
        lost = any(_is_older(has.get(key), sent) for key, sent in self._newest.items())
        if lost or run_id != self._run_id:
            self._feeds, self._events_done = _feeds(self.journal.run_dir), 0
        self._newest, self._asked = has, True
        if run_id != self._run_id:
            self._run_id = run_id
            log.info("run %r: %s", start["run_name"], self.where())
            if known not in (None, run_id):
                log.warning("run %s is not on the server any more, hence this one", known)

    def where(self) -> str:
        """Return the address of the run (or its id, for a store without a server)."""
        uri = without_password(self.uri)
        if not uri.startswith("http"):
            return f"{uri} run {self._state['run_id']}"
        return run_link(uri, self._state["experiment_id"], self._state["run_id"])

    def _find(self, run_id: str | None, start: dict[str, Any]) -> Any:
        if run_id is not None:
            try:
                return self._get(run_id)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
        experiment = self._client.get_experiment_by_name(start["experiment"])
        if experiment is None:
            return None
        found = self._same(experiment.experiment_id, start)
        return self._get(found[0].info.run_id) if found else None

    def _same(self, experiment_id: str, start: dict[str, Any]) -> list[Any]:
        """Return the runs with this run's key, those with metrics first: one, rarely a double."""
        same = f"tags.`{RUN_KEY_TAG}` = '{start['run_key']}'"
        runs = self._client.search_runs([experiment_id], same)
        return sorted(runs, key=lambda run: not run.data.metrics)

    def _get(self, run_id: str) -> Any:
        run = self._client.get_run(run_id)
        if run.info.run_id != run_id:  # what MLflow makes of an answer without content
            raise MlflowException(f"the server's answer is not run {run_id}")
        return run

    def _create(self, start: dict[str, Any]) -> Any:
        run = self._client.create_run(
            experiment_id_of(self._client, self.uri, start["experiment"]),
            start_time=int(start["time"] * 1000),
            tags={RUN_KEY_TAG: start["run_key"]},
            run_name=start["run_name"],
        )
        return self._get(run.info.run_id)

    def _send_starts(self, starts: list[dict[str, Any]], new: list[dict[str, Any]]) -> bool:
        if not new:
            return False
        has = self._client.get_run(self._run_id).data
        first = {_name(k): v[:MAX_PARAM_VAL_LENGTH] for k, v in first_values(starts).items()}
        params = [Param(key, value) for key, value in first.items() if key not in has.params]
        for chunk in batched(params, MAX_PARAMS_TAGS_PER_BATCH):
            self._client.log_batch(self._run_id, params=chunk)
        tags = {_name(key): tag for start in new for key, tag in start["tags"].items()}
        # Parameters cannot be changed in MLflow; tags say what was.
        changed = {_name(f"changed.{key}"): text for key, text in changes(starts).items()}
        tags |= changed | {BRANCHES_TAG: branches_tag(starts)}
        run_tags = [RunTag(key, tag[:MAX_TAG_VAL_LENGTH]) for key, tag in tags.items()]
        for chunk in batched(run_tags, MAX_PARAMS_TAGS_PER_BATCH):
            self._client.log_batch(self._run_id, tags=chunk)
        for key in {_name(f"changed.{key}") for key in first} & set(has.tags) - set(changed):
            self._client.delete_tag(self._run_id, key)
        return True

    def _send_metrics(self) -> bool:
        moved = False
        for feed in self._feeds:
            while lines := feed.read(_LINES_PER_READ):
                # Asked after the lines: a later job may have begun and written them by now.
                if self._overtaken():
                    return moved
                given_up = branches(_starts(self.journal.events()))
                sent_to = {name: self._sent_to(name, given_up) for name in self._newest}
                points = [point for line in lines for point in _points(line, sent_to)]
                for chunk in batched(points, MAX_METRICS_PER_BATCH):
                    self._log_metrics(chunk)
                    self._newest |= {m.key: (m.step, m.timestamp) for m in chunk}
                    moved = True
                self._on_batch(feed.acknowledge())
        return moved

    def _sent_to(self, metric: str, given_up: list[tuple[float, int]]) -> int:
        """Return the step up to which the server has the points that count."""
        step, time_ms = self._newest[metric]
        if metric.startswith("system/"):  # counts samples: steps done again are not its own
            return step
        return min([step, *(after for time_s, after in given_up if time_ms < 1000 * time_s)])

    def _log_metrics(self, metrics: Sequence[Metric]) -> None:
        try:
            self._client.log_batch(self._run_id, metrics=metrics)
        except MlflowException as error:
            if error.error_code != "INVALID_PARAMETER_VALUE":
                raise
            # Refused for good; trying again would hold up everything behind it for ever.
            if self._client.get_run(self._run_id).info.lifecycle_stage != "active":
                raise RunGoneError(f"run {self._run_id} was deleted in MLflow") from error
            log.error("MLflow refuses %d points: %s", len(metrics), error.message)
            return
        self.sent_metrics += len(metrics)

    def _send_artifacts(self, events: list[dict[str, Any]]) -> bool:
        if is_archived(self.journal.run_dir):
            return False  # its files have been written anew by the next run
        done: dict[str, list[list[Any]]] = self._state.setdefault("artifacts", {})
        moved = False
        for event in events:
            if event["event"] != "artifact":
                continue
            path = Path(event["path"])
            if not path.exists():
                if event["path"] not in done:
                    log.warning("%s: artefact was gone before it could be sent", path)
                continue
            version = _version(path)
            if done.get(event["path"]) == version:
                continue
            self._send_artifact(path, event.get("folder") or None)
            done[event["path"]] = version
            self.journal.save_state(self.uri, self._state)
            moved = True
        return moved

    def _send_artifact(self, path: Path, folder: str | None) -> None:
        if path.is_dir():
            inside = f"{folder}/{path.name}" if folder else path.name
            self._client.log_artifacts(self._run_id, str(path), inside)
        else:
            self._client.log_artifact(self._run_id, str(path), folder)
        try:
            files = self._client.list_artifacts(self._run_id, folder)
        except ValueError as error:
            raise MlflowException(f"the server's answer is no list of files: {error}") from error
        if path.name not in {Path(file.path).name for file in files}:
            raise MlflowException(f"{path} did not arrive")  # e.g. a login page was the answer

    def _set_status(self, events: list[dict[str, Any]], new: list[dict[str, Any]]) -> None:
        if not any(event["event"] in ("start", "finish") for event in new):
            return
        end = end_of_last_start(events)
        if end is None:
            self._client.update_run(self._run_id, status="RUNNING")
            return
        for double in self._same(self._state["experiment_id"], _starts(events)[0]):
            if double.info.run_id != self._run_id and not double.data.metrics:
                self._client.delete_run(double.info.run_id)
        self._client.set_tag(self._run_id, "end_reason", end.get("reason", "as the job said"))
        self._client.set_terminated(self._run_id, end["status"], int(end["time"] * 1000))


def experiment_id_of(client: MlflowClient, uri: str, name: str) -> str:
    """Return the id of an experiment, which is made where there is none."""
    found = client.get_experiment_by_name(name)
    if found is None:
        experiment_id = client.create_experiment(name, artifact_location(uri, name))
    else:
        experiment_id = found.experiment_id
    if found is None or EXPERIMENT_KIND[0] not in found.tags:
        client.set_experiment_tag(experiment_id, *EXPERIMENT_KIND)
    return experiment_id


def add_scores(
    uri: str, run_id: str, metrics: Mapping[str, float], files: Iterable[Path], step: int
) -> None:
    """Log one value of each metric and some files to a run, whatever its status."""
    client = MlflowClient(tracking_uri=uri)
    now_ms = int(time.time() * 1000)
    points = [Metric(_name(key), value, now_ms, step) for key, value in metrics.items()]
    for chunk in batched(points, MAX_METRICS_PER_BATCH):
        client.log_batch(run_id, metrics=chunk)
    for file in files:
        client.log_artifact(run_id, str(file), "evaluation")


class _Feed:
    """Reads a growing file of lines from where it was; starts over when the file was replaced."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._inode = 0
        self._offset = 0
        self._read_to = 0

    def read(self, max_lines: int) -> list[dict[str, Any]]:
        """Return up to ``max_lines`` lines not yet acknowledged; torn ones are left or passed."""
        self._notice_replacement()
        if not self.path.exists():
            return []
        lines: list[dict[str, Any]] = []
        with self.path.open("rb") as file:
            file.seek(self._offset)
            while len(lines) < max_lines and (raw := file.readline()).endswith(b"\n"):
                self._read_to = file.tell()
                if (values := decode_line(raw.decode(errors="replace"))) is not None:
                    lines.append(values)
        return lines

    def acknowledge(self) -> int:
        """Do not return the lines of the last read again; say how many bytes that were."""
        done_bytes = self._read_to - self._offset
        self._offset = self._read_to
        return done_bytes

    def bytes_waiting(self) -> int:
        """Return how much of the file is still to be read."""
        return max(0, self.path.stat().st_size - self._offset) if self.path.exists() else 0

    def _notice_replacement(self) -> None:
        status = self.path.stat() if self.path.exists() else None
        if status is None or status.st_ino != self._inode or status.st_size < self._offset:
            self._inode = status.st_ino if status else 0
            self._offset = self._read_to = 0


def _feeds(run_dir: Path) -> list[_Feed]:
    return [_Feed(run_dir / METRICS_FILE), _Feed(run_dir / SYSTEM_METRICS_FILE)]


def _is_older(has: tuple[int, int] | None, sent: tuple[int, int]) -> bool:
    """Whether the newest point (step, time) that a server has cannot follow one sent before."""
    return has is None or has[0] < sent[0] or has[1] < sent[1]


def _starts(events: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return [event for event in events if event["event"] == "start"]


def _points(line: dict[str, Any], sent_to: Mapping[str, int]) -> Iterator[Metric]:
    """Return the values of a line that are of later steps than what was sent of their metric."""
    for key, value in line.items():
        if key not in NOT_METRICS and line["step"] > sent_to.get(name := _name(key), -1):
            yield Metric(name, float(value), int(line["time"] * 1000), line["step"])


@cache  # of some hundred names, asked for in every line
def _name(key: str) -> str:
    """Return a name that MLflow accepts; ours are, those of users may not be."""
    return re.sub(r"[^/\w.\- :]", "_", key).strip("/")[:MAX_ENTITY_KEY_LENGTH]


def _version(path: Path) -> list[list[Any]]:
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    seen = [(f, f.stat()) for f in files if f.is_file()]
    return [[str(f), s.st_mtime_ns, s.st_size] for f, s in seen]
