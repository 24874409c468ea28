"""The training side of MLflow: writes down what happened, and starts the process that sends it.

Training never talks to MLflow and never imports it: importing alone costs seconds of the
interpreter, and a thread that sends would take the interpreter lock from the training loop. This
tracker appends start, artefact and finish events to ``RUN_DIR/mlflow/events.jsonl``; a child
process (sender.py) sends those and the lines of metrics.jsonl, and outlives a crash of the job.
"""

import atexit
import getpass
import json
import logging
import os
import shlex
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pltmoe
from pltmoe.config import RunConfig, config_to_dict, without_password
from pltmoe.config.counts import count_parameters
from pltmoe.config.describe import describe_model, variant
from pltmoe.tracking.base import EndStatus
from pltmoe.tracking.journal import Journal, process_identity
from pltmoe.tracking.jsonl import read_jobs, sync_command
from pltmoe.tracking.store import run_link, usable_uri

_LOOK_AFTER_SENDER_S = 10.0

log = logging.getLogger(__name__)


class MLflowTracker:
    """One MLflow run per run directory; a resumed job continues it.

    Args:
        config: the run; its ``tracking.mlflow_uri`` must be set.
        run_dir: directory of the run.
        give_up_s: how long the end of a job may wait for a server that makes no progress.

    Raises:
        ConfigError: ``tracking.mlflow_uri`` is nothing MLflow can use.
    """

    def __init__(self, config: RunConfig, run_dir: Path, give_up_s: float = 15.0) -> None:
        assert config.tracking.mlflow_uri is not None
        self._config = config
        self._run_dir = run_dir.absolute()
        self._uri = usable_uri(config.tracking.mlflow_uri)
        self._give_up_s = give_up_s
        self._journal = Journal(self._run_dir)
        self.attempt = uuid.uuid4().hex
        self._sender: subprocess.Popen[bytes] | None = None
        self._look_again = 0.0
        self._open = False
        self._pid = os.getpid()

    def start(self, tags: Mapping[str, str], resume_step: int | None = None) -> None:
        """Begin a run, or continue the one that this directory belongs to."""
        with self._going_on():
            self.record_start(tags, resume_step)
            self._open = True
            atexit.register(self.finish, "FAILED")  # left without finish(): not a finished run
            self._spawn()
            log.info("MLflow: sending to %s", without_password(self._uri))

    def record_start(
        self,
        tags: Mapping[str, str],
        resume_step: int | None,
        **known_better: Any,
    ) -> None:
        """Write the start event, without starting to send (``host`` if not here).

        Its time is that of the job in run.json, and so never before that of earlier jobs.

        Before it those of jobs since the last one that ran without MLflow. Their settings are not
        known any more, so they count as others: what they did anew is sent.
        """
        jobs = read_jobs(self._run_dir)  # the newest is the one that starts
        for job in self._journal.untracked(jobs[:-1]):
            where = {"host": "unknown", "time": job["started"]}
            self._append_start({}, job["tags"], job["resume_step"], **where)
        settings = flatten(config_to_dict(self._config))
        if jobs:
            known_better.setdefault("time", jobs[-1]["started"])
        self._append_start(settings, tags, resume_step, **known_better)
        config_file = self._run_dir / "config.yaml"
        if config_file.exists():
            self.artifact(config_file)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Nothing to write: the sender reads metrics.jsonl. Looks whether it is still there."""
        now = time.monotonic()
        if now < self._look_again or self._sender is None:
            return
        self._look_again = now + _LOOK_AFTER_SENDER_S
        if self._sender.poll() is not None:
            self._sender = None
            log.warning(
                "MLflow: the sending process ended. Training goes on; later: %s", self._later
            )

    def artifact(self, path: Path) -> None:
        """Note a file or directory; it is read when it is sent."""
        with self._going_on():
            self._journal.append("artifact", path=str(path.absolute()))

    def finish(self, status: EndStatus) -> None:
        """Note how the run ended and give the sender a limited time to deliver the rest."""
        if not self._open or os.getpid() != self._pid:  # a forked child may run atexit as well
            return
        self._open = False
        atexit.unregister(self.finish)
        with self._going_on():
            self._journal.append("finish", status=status, attempt=self.attempt)
            sender = self._sender or self._spawn()
            self._wait(sender, status)

    def _wait(self, sender: "subprocess.Popen[bytes]", status: EndStatus) -> None:
        # After SIGTERM a scheduler kills everything within half a minute or so.
        patience_s = self._give_up_s * (1 if status == "KILLED" else 4)
        try:
            unsent = sender.wait(timeout=patience_s) != 0
        except subprocess.TimeoutExpired:
            log.warning("MLflow: still sending in the background (process %d)", sender.pid)
            return
        if unsent:
            log.warning("MLflow: not everything was sent. Nothing is lost; later: %s", self._later)

    @contextmanager
    def _going_on(self) -> Iterator[None]:
        """Turn what the machine refuses (a full disk, no more processes) into a warning."""
        try:
            yield
        except OSError as error:
            log.warning("MLflow: %s. Training goes on; later: %s", error, self._later)

    @property
    def _later(self) -> str:
        return sync_command(self._run_dir)

    def _append_start(
        self,
        settings: Mapping[str, str],
        tags: Mapping[str, str],
        resume_step: int | None,
        **known_better: Any,
    ) -> None:
        before = self._journal.last_start()
        self._journal.append(
            "start",
            attempt=self.attempt,
            run_key=before["run_key"] if before else uuid.uuid4().hex,
            run_name=self._config.name,
            experiment=self._config.tracking.experiment,
            uri=without_password(self._uri),
            resume_step=resume_step,
            params=settings,
            tags=self._tags(tags, resume_step),
            **(process_identity() | known_better),
        )

    def _tags(self, tags: Mapping[str, str], resume_step: int | None) -> dict[str, str]:
        found = {
            "model": self._config.name,
            **_about(self._config),
            "resumed": "false" if resume_step is None else "true",
            "mlflow.user": _user(),
            "mlflow.source.name": Path(sys.argv[0]).name,
            "mlflow.source.type": "LOCAL",
        }
        if resume_step is not None:
            found["resumed_from_step"] = str(resume_step)
        if "commit" in tags:
            found["mlflow.source.git.commit"] = tags["commit"]
        return found | dict(tags) | self._config.tracking.tags

    def _spawn(self) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-m", "pltmoe.tracking.sender", str(self._run_dir)]
        command += ["--attempt", self.attempt, "--give-up-after", str(self._give_up_s)]
        if self._config.tracking.system_metrics:
            command.append("--system-metrics")
        package_root = str(Path(pltmoe.__file__).parents[1])
        path = os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH")]))
        # The URI goes by the environment: it may hold a password, and `ps` shows arguments.
        environment = os.environ | {"PYTHONPATH": path, "PLTMOE_MLFLOW_URI": self._uri}
        # Its own session, so that Ctrl-C or a signal to the job's group leaves it to report that.
        self._sender = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        return self._sender


def _about(config: RunConfig) -> dict[str, str]:
    """Return tags that tell runs apart in a list, and the run's description."""
    counts, kind = count_parameters(config.model), variant(config.model)
    tokens = config.train.steps * config.train.global_batch_size * config.data.sequence_length
    return {
        "variant": kind,
        "loops": str(config.model.num_loops),
        "parameters": f"{counts.total:,}",
        "active_parameters": f"{counts.active:,}",
        "mlflow.note.content": (
            f"**{kind}**: {describe_model(config.model)}; {counts.total:,} parameters, "
            f"{counts.active:,} active per token; {tokens:,} tokens planned"
        ),
    }


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return nested settings as dotted names and values as one would write them in YAML."""
    flat: dict[str, str] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{name}.")
        elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
            flat |= flatten({str(i): item for i, item in enumerate(value)}, f"{name}.")
        elif isinstance(value, str):
            flat[name] = value
        else:
            flat[name] = json.dumps(value, default=str)
    return flat


def how_to_look(run_dir: Path) -> str | None:
    """Say where to look at the experiment of a run; None when it was never sent to MLflow."""
    journal = Journal(run_dir)
    start = journal.last_start()
    state = journal.state(start["uri"]) if start else {}
    if not start or not state:
        return None
    return page_of(start["uri"], state["experiment_id"])


def page_of(uri: str, experiment_id: str) -> str:
    """Return the address of an experiment, with the command that serves it if nothing does."""
    if uri.startswith("http"):
        return run_link(uri, experiment_id)
    serve = f"MLFLOW_DISABLE_TELEMETRY=true mlflow ui --backend-store-uri {shlex.quote(uri)}"
    return f"{serve}   then {run_link('http://127.0.0.1:5000', experiment_id)}"


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user id without a name
        return str(os.getuid())
