"""A run's configuration and logged lines: from its directory, or from MLflow."""

import json
import math
import re
import sys
import tempfile
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from pltmoe.config import RunConfig, load_config, without_password
from pltmoe.config.counts import flops_per_token
from pltmoe.errors import DataError
from pltmoe.tracking.jsonl import METRICS_FILE, read_jobs, read_lines
from pltmoe.tracking.legs import BRANCHES_TAG

MLFLOW_PREFIX = "mlflow:"
"""What an MLflow run begins with where a folder could stand."""
_PLACE = re.compile(r"^(?P<metric>.+)/loop_(?P<loop>\d+)/layer_(?P<layer>\d+)$")


@dataclass(frozen=True)
class Point:
    """One value of one metric."""

    step: int
    tokens: int
    flops: float
    """Training FLOPs spent up to here: tokens times what the model must compute per token."""
    value: float


@dataclass(frozen=True)
class Run:
    """Configuration and logged lines of a run."""

    config: RunConfig
    lines: list[dict[str, Any]]
    source: str
    """Where it was read from."""
    jobs: list[dict[str, Any]] = field(default_factory=list)
    """Jobs that worked on it, oldest first, with tags (device, layout, commit) and status."""

    @property
    def name(self) -> str:
        """Name of the run, as in its configuration."""
        return self.config.name

    @property
    def flops_per_token(self) -> float:
        """FLOPs of one trained token, forward and backward, all loops."""
        return flops_per_token(self.config.model, self.config.data.sequence_length)

    @property
    def last_step(self) -> int:
        """Newest logged step."""
        return max(line["step"] for line in self.lines)

    @property
    def tokens(self) -> int:
        """Tokens trained on."""
        return max(line["tokens"] for line in self.lines)

    def series(self, metric: str) -> list[Point]:
        """Return the values of a metric in the order of steps; empty when it was never logged.

        ``train/loss`` is without the steps that were skipped: they did not train.
        """
        skipped = self._skipped_steps() if metric == "train/loss" else set()
        cost = self.flops_per_token
        points = [
            Point(m["step"], m["tokens"], m["tokens"] * cost, m[metric])
            for m in self.lines
            if metric in m and m["step"] not in skipped
        ]
        return sorted(points, key=lambda point: point.step)

    def has(self, metric: str) -> bool:
        """Whether a metric was ever logged."""
        return any(metric in line for line in self.lines)

    def _skipped_steps(self) -> set[int]:
        """Return the steps at which their count rose; each is logged, whatever the interval."""
        name = "train/skipped_steps"
        counts = sorted((m["step"], m[name]) for m in self.lines if name in m)
        if counts and counts[0][0] == 1:  # else it went on from a checkpoint
            counts.insert(0, (0, 0.0))
        return {step for (_, before), (step, count) in pairwise(counts) if count > before}

    def by_loop_and_layer(self, metric: str) -> dict[tuple[int, int], list[Point]]:
        """Return the series of ``metric/loop_l/layer_nn`` by (loop, layer), both from 1."""
        names = {key for line in self.lines for key in line}
        found = {}
        for name in sorted(names):
            match = _PLACE.match(name)
            if match and match["metric"] == metric:
                found[int(match["loop"]), int(match["layer"])] = self.series(name)
        return found

    def tag(self, name: str) -> str | None:
        """Return a tag of the newest job that has it."""
        return next((j["tags"][name] for j in reversed(self.jobs) if name in j["tags"]), None)

    @property
    def status(self) -> str | None:
        """FINISHED, FAILED or KILLED; RUNNING when nobody wrote an end; None when unknown."""
        return self.jobs[-1]["status"] if self.jobs else None


def read_run(run_dir: Path) -> Run:
    """Read a run directory.

    Raises:
        DataError: no metrics.jsonl or config.yaml there, or no line in it.
        ConfigError: its config.yaml is not a valid configuration.
    """
    for name in (METRICS_FILE, "config.yaml"):
        if not (run_dir / name).exists():
            raise DataError(f"{run_dir}: no {name} here; give the output directory of a run")
    lines = list(read_lines(run_dir / METRICS_FILE))
    if not lines:
        raise DataError(f"{run_dir / METRICS_FILE}: no step was logged yet")
    config = load_config(run_dir / "config.yaml")
    return Run(config, lines, printable(str(run_dir)), read_jobs(run_dir))


def printable(text: str) -> str:
    """Return a path or an argument, which may be no UTF-8, as text that can be written."""
    return text.encode(errors="backslashreplace").decode()


def read_mlflow_run(uri: str, run_id: str) -> Run:
    """Read a run from an MLflow server or store; it must have been tracked by this package.

    Raises:
        DataError: no such run, it has no metrics, or no config.yaml among its artefacts.
    """
    from pltmoe.tracking.store import one_line, quick_to_fail

    quick_to_fail()  # only this function pays for mlflow
    where = f"{without_password(uri)} run {run_id}"
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    client = MlflowClient(uri)
    try:
        run = client.get_run(run_id)
        with tempfile.TemporaryDirectory() as folder:
            config = load_config(client.download_artifacts(run_id, "config.yaml", folder))
        histories = {key: client.get_metric_history(run_id, key) for key in run.data.metrics}
    except (MlflowException, OSError) as error:
        raise DataError(f"{where} cannot be read: {one_line(error)}") from None
    if empty := [key for key, history in histories.items() if not history]:
        raise DataError(f"{where} cannot be read: the answer holds no points of {empty[0]}")
    per_step = config.train.global_batch_size * config.data.sequence_length
    rows: dict[int, dict[str, Any]] = {}
    branches = json.loads(run.data.tags.get(BRANCHES_TAG, "[]"))
    for key, history in histories.items():
        if key.startswith("system/"):
            continue  # counted in samples, not in steps
        for m in sorted(history, key=lambda m: m.timestamp):  # of one step the later counts
            if any(m.timestamp < 1000 * time and m.step > step for time, step in branches):
                continue  # of a branch that was given up
            row = rows.setdefault(m.step, {"step": m.step})
            row[key] = _as_logged(m.value)
            row["time"] = max(row.get("time", 0.0), m.timestamp / 1000)
    if not rows:
        raise DataError(f"{where}: no metrics")
    _add_tokens(rows, per_step)
    job = {"status": run.info.status, "tags": run.data.tags, "started": run.info.start_time / 1e3}
    return Run(config, [rows[step] for step in sorted(rows)], where, [job])


def _as_logged(value: float) -> float:
    """Return infinity for the largest float, which is what MLflow's stores keep of it."""
    return math.copysign(math.inf, value) if abs(value) == sys.float_info.max else value


def _add_tokens(rows: dict[int, dict[str, Any]], per_step: int) -> None:
    """Add ``tokens`` to rows by step: as logged, else between those logged (or ``per_step`` on).

    The batch size may have changed on a resume.
    """
    known = {0: 0.0} | {s: row["train/tokens"] for s, row in rows.items() if "train/tokens" in row}
    steps = sorted(known)
    tokens = [known[step] for step in steps]
    for step, row in rows.items():
        beyond = max(0, step - steps[-1]) * per_step
        row["tokens"] = round(float(np.interp(step, steps, tokens))) + beyond
