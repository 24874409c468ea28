"""RUN_DIR/mlflow/: what MLflow is to be told, and what it has acknowledged.

    events.jsonl   start, artifact and finish events, appended by the training process
    state.json     per server: run id and what it has, written by whoever sends
    lock           held by the one process that sends

Metrics are not repeated here: senders read metrics.jsonl. So all that is ever waiting for a server
is on disk, memory stays bounded however long the server is gone, and "send later" is the same
code as "send now".
"""

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pltmoe.config import without_password
from pltmoe.tracking.jsonl import MLFLOW_FOLDER, read_jobs

EVENTS_FILE = "events.jsonl"
STATE_FILE = "state.json"
VANISHED = "the process was gone without a word: kill -9, out of memory, or a lost machine"
"""How a job ended that did not say so."""


class Journal:
    """The events and the state of one run directory."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.folder = run_dir / MLFLOW_FOLDER
        self.events_path = self.folder / EVENTS_FILE
        self._state_path = self.folder / STATE_FILE
        self._version: tuple[int, int, int] | None = None  # of the file that _events were read from
        self._events: list[dict[str, Any]] = []

    def append(self, kind: str, **fields: Any) -> None:
        """Add one event; behind a torn line (a lost machine, a full disk) on a line of its own."""
        self.folder.mkdir(parents=True, exist_ok=True)
        event = {"event": kind, "time": round(time.time(), 3)} | fields
        with self.events_path.open("ab+") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 1))
            torn = file.read(1) not in (b"", b"\n")
            file.write(("\n" * torn + json.dumps(event) + "\n").encode())

    def events(self) -> list[dict[str, Any]]:
        """Return all complete events, oldest first; torn lines are passed over."""
        try:
            file = self.events_path.open("rb")
        except FileNotFoundError:
            return []
        with file:  # NFS asks its server at an open, at a stat perhaps a minute later
            status = os.fstat(file.fileno())
            version = status.st_ino, status.st_size, status.st_mtime_ns
            if version != self._version:  # senders ask often; a start has all settings
                lines = file.read().decode(errors="replace").split("\n")[:-1]
                self._events = [event for line in lines if (event := _decode(line)) is not None]
                self._version = version
        return list(self._events)

    def last_start(self) -> dict[str, Any] | None:
        """Return the newest start event."""
        return next((e for e in reversed(self.events()) if e["event"] == "start"), None)

    def untracked(self, jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return those jobs of run.json that began after the last start event."""
        start = self.last_start()
        return [job for job in jobs if start is None or job["started"] > start["time"]]

    def overtaken(self) -> bool:
        """Whether a job without MLflow began since: its lines are not those of the last start."""
        return bool(self.untracked(read_jobs(self.run_dir)))

    def last_end(self) -> dict[str, Any] | None:
        """Return the finish event of the newest start, if it has one."""
        return end_of_last_start(self.events())

    def state(self, uri: str) -> dict[str, Any]:
        """Return what the server at ``uri`` has acknowledged of this run; empty when nothing.

        A late sender of the run that was in this folder before may have written another's.
        """
        state = self._states().get(without_password(uri), {})
        key = (self.last_start() or {}).get("run_key")
        return state if state.get("run_key", key) == key else {}

    def save_state(self, uri: str, state: Mapping[str, Any]) -> None:
        """Replace the state of ``uri`` atomically."""
        states = self._states() | {without_password(uri): dict(state)}
        new = self._state_path.with_suffix(".new")
        new.write_text(json.dumps(states, indent=1) + "\n", encoding="utf-8")
        os.replace(new, self._state_path)

    @contextmanager
    def lock(self, wait_s: float) -> Iterator[bool]:
        """Hold the right to send; yields False when another process has it for ``wait_s``."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("wb") as file:
            deadline = time.monotonic() + wait_s
            while not (mine := _try_lock(file.fileno())) and time.monotonic() < deadline:
                time.sleep(0.2)
            yield mine

    def _states(self) -> dict[str, Any]:
        """Return what is in state.json; an unreadable one (a lost machine) counts as none.

        The run is then found again by its key, and what the server has is asked of the server.
        """
        if not self._state_path.exists():
            return {}
        return _decode(self._state_path.read_text(encoding="utf-8", errors="replace")) or {}


def end_of_last_start(events: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the finish event that belongs to the newest start event.

    The end of an earlier attempt may stand *behind* that start: its sender notices a kill -9 at
    about the time when the next job begins.
    """
    start = next((e for e in reversed(events) if e["event"] == "start"), None)
    ends = [e for e in events if e["event"] == "finish" and e["attempt"] == start["attempt"]]
    return ends[-1] if ends else None


def vanished(start: Mapping[str, Any]) -> bool:
    """Whether the process of a start event, on this machine, is no more."""
    if start["host"] != socket.gethostname():
        return False
    return _process_started(start["pid"]) != start["pid_started"]


def process_identity() -> dict[str, Any]:
    """Return what tells this process from a later one that gets the same number."""
    pid = os.getpid()
    return {"host": socket.gethostname(), "pid": pid, "pid_started": _process_started(pid)}


def _process_started(pid: int) -> str | None:
    """Start time of a process in clock ticks since boot (proc(5), field 22), or None."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] == "Z" else fields[19]


def _decode(text: str) -> dict[str, Any] | None:
    try:
        values = json.loads(text)
    except json.JSONDecodeError:
        return None
    return values if isinstance(values, dict) else None


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
