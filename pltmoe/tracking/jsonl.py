"""metrics.jsonl: one line per logged step, always written, and all that plots and MLflow need.

What is known only after its step's line was written, as the time of a save, has a line of its own.

Beside it, run.json says for each job that worked on the run where it ran, from which step, and how
it ended.

A line is strict JSON: ``{"step": 10, "time": 1767225600.1, "tokens": 20480, "train/loss": 3.2}``.
``time`` is seconds since 1970, ``tokens`` all tokens trained on up to this step. JSON knows no
NaN: values that are not finite are written as the strings "NaN", "Infinity", "-Infinity".

Time never goes back in a run: what MLflow still needs is told by it. A job counts on from the
newest time where its clock is behind those of the jobs before it, or is set back.
"""

import json
import logging
import math
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from pltmoe.errors import DataError
from pltmoe.tracking.base import EndStatus

METRICS_FILE = "metrics.jsonl"
JOBS_FILE = "run.json"
SYSTEM_METRICS_FILE = "system_metrics.jsonl"
MLFLOW_FOLDER = "mlflow"
PREVIOUS_FOLDER = "previous"
NOT_METRICS = frozenset({"step", "time", "tokens"})
"""Keys of a line that are coordinates, not metrics."""

_STEP = re.compile(rb'\{"step": (\d+), ')
_STAMP = re.compile(r"\d{8}_\d{6}(_\d+)?")

log = logging.getLogger(__name__)


class JsonlTracker:
    """Writes ``RUN_DIR/metrics.jsonl``, flushed line by line so that a killed job keeps them."""

    def __init__(self, run_dir: Path, tokens_after: Callable[[int], int]) -> None:
        """Take the run's folder, and what tells the tokens read after a step."""
        self.path = run_dir / METRICS_FILE
        self._tokens_after = tokens_after
        self._file: TextIO | None = None
        self._newest_s = 0.0
        self._ahead_s = 0.0  # of this machine's clock

    def start(self, tags: Mapping[str, str], resume_step: int | None = None) -> None:
        """Open the file: after a resume without the lines that will be written again.

        Lines of steps after the checkpoint belong to work that is lost and done again; they are
        cut off. Without a resume, what an earlier run left here moves to ``previous/``.

        Raises:
            DataError: a file of the run's folder cannot be written.
        """
        folder = self.path.parent
        with writing(self.path):
            folder.mkdir(parents=True, exist_ok=True)
            if resume_step is None:
                archive_previous(folder)
            else:
                self._count_on()
                drop_after(self.path, resume_step)
            job = {"started": self._now(), "resume_step": resume_step, "status": "RUNNING"}
            self._file = self.path.open("a", encoding="utf-8")
            write_jobs(folder, [*read_jobs(folder), job | {"tags": dict(tags)}])

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line and flush it to the operating system.

        Raises:
            DataError: it cannot be written, e.g. to a full disk.
        """
        assert self._file is not None, "start() comes before log()"
        line = {"step": step, "time": self._now(), "tokens": self._tokens_after(step)}
        with writing(self.path):
            self._file.write(encode_line(line | dict(metrics)))
            self._file.flush()

    def artifact(self, path: Path) -> None:
        """Nothing to do: the run directory is where artefacts are."""

    def finish(self, status: EndStatus) -> None:
        """Close the file and note how this job ended; where that fails, a warning says so."""
        if self._file is None:
            return
        file, self._file = self._file, None
        try:
            with writing(self.path):
                file.close()
                *before, job = read_jobs(self.path.parent)
                job |= {"status": status, "ended": self._now()}
                write_jobs(self.path.parent, [*before, job])
        except DataError as error:  # must not hide what ended the run
            log.warning("the end of this job (%s) is not recorded: %s", status, error)

    def _now(self) -> float:
        clock = time.time()
        self._ahead_s = max(self._ahead_s, self._newest_s - clock)
        self._newest_s = clock + self._ahead_s
        return round(self._newest_s, 3)

    def _count_on(self) -> None:
        """Look whether the records of the jobs before are of a time that is still to come."""
        times = [line.get("time", 0.0) for line in last_lines(self.path)]
        for job in read_jobs(self.path.parent):
            times += [job["started"], job.get("ended", 0.0)]
        self._newest_s = max(times, default=0.0) + 0.001
        behind_s = self._newest_s - time.time()
        if behind_s > 0:
            log.warning(
                "this machine's clock is %.1f s behind the times that the run has recorded: they "
                "go on from there", behind_s,
            )  # fmt: skip


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Turn what the file system refuses into a DataError that names the file."""
    try:
        yield path
    except OSError as error:
        where, why = error.filename2 or error.filename or path, error.strerror or error
        raise DataError(f"{where}: cannot be written ({why})") from error


def read_jobs(run_dir: Path) -> list[dict[str, Any]]:
    """Return the jobs that worked on a run, oldest first; RUNNING may also mean killed.

    A file that cannot be read (a lost machine) counts as none, with a warning.
    """
    path = run_dir / JOBS_FILE
    try:
        return json.loads(path.read_text(encoding="utf-8"))["jobs"] if path.exists() else []
    except (ValueError, TypeError, KeyError):
        log.warning("%s: damaged; what it said of earlier jobs is lost", path)
        return []


def write_jobs(run_dir: Path, jobs: list[dict[str, Any]]) -> None:
    """Replace run.json atomically."""
    new = run_dir / (JOBS_FILE + ".new")
    new.write_text(json.dumps({"jobs": jobs}, indent=1) + "\n", encoding="utf-8")
    os.replace(new, run_dir / JOBS_FILE)


def encode_line(values: Mapping[str, Any]) -> str:
    """Return one line of strict JSON, newline included."""
    return json.dumps({k: _plain(v) for k, v in values.items()}, allow_nan=False) + "\n"


def decode_line(line: str) -> dict[str, Any] | None:
    """Return the values of a line, or None for a torn one (a job killed while it wrote)."""
    if not line.endswith("\n"):
        return None
    try:
        values = json.loads(line)
    except json.JSONDecodeError:
        return None
    if not isinstance(values, dict) or "step" not in values:
        return None
    # "NaN" and "Infinity" are the only strings a line holds; float() reads both.
    # Who keeps a million lines keeps each name once.
    return {sys.intern(k): float(v) if isinstance(v, str) else v for k, v in values.items()}


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the complete lines of a metrics file, in file order; nothing when there is none."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            if (values := decode_line(line)) is not None:
                yield values


def last_lines(path: Path, size: int = 1 << 20) -> list[dict[str, Any]]:
    """Return the complete lines in the last ``size`` bytes of a metrics file, if there is one."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - size))
        lines = [decode_line(line.decode(errors="replace")) for line in file]
    return [line for line in lines if line is not None]


def drop_after(path: Path, step: int) -> int:
    """Remove the lines of steps after ``step`` and torn lines, all or nothing; return how many."""
    if not path.exists():
        return 0
    with path.open("rb") as file:
        dropped = {number for number, line in enumerate(file) if not _is_up_to(line, step)}
    if not dropped:
        return 0
    new = path.with_name(path.name + ".new")
    with path.open("rb") as old, new.open("wb") as file:
        file.writelines(line for number, line in enumerate(old) if number not in dropped)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)
    log.info("%s: cut %d lines after step %d, they come again", path, len(dropped), step)
    return len(dropped)


def archive_previous(run_dir: Path) -> Path | None:
    """Move the records of an earlier run in this directory out of the way; nothing is deleted.

    Returns the folder, which tools/sync_mlflow.py can send if the run was tracked.
    """
    names = (METRICS_FILE, JOBS_FILE, SYSTEM_METRICS_FILE, MLFLOW_FOLDER)
    found = [run_dir / name for name in names if (run_dir / name).exists()]
    if not found:
        return None
    stamp = time.strftime("%Y%m%d_%H%M%S")
    folder = run_dir / PREVIOUS_FOLDER / stamp
    number = 1
    while folder.exists():
        number += 1
        folder = run_dir / PREVIOUS_FOLDER / f"{stamp}_{number}"
    folder.mkdir(parents=True)
    for path in found:
        os.replace(path, folder / path.name)
    log.warning("%s: starts from scratch; records of the run before are in %s", run_dir, folder)
    if (folder / MLFLOW_FOLDER).exists():
        again = sync_command(folder)
        log.warning("the run before is ended in MLflow if this one is tracked; else: %s", again)
    return folder


def sync_command(run_dir: Path | str) -> str:
    """Return what sends a run to MLflow later, to be pasted into a shell."""
    return f"python tools/sync_mlflow.py {shlex.quote(str(run_dir))}"


def archived(run_dir: Path) -> list[Path]:
    """Return the folders of ``archive_previous``, oldest first."""
    return sorted(filter(is_archived, (run_dir / PREVIOUS_FOLDER).glob("*")))


def is_archived(run_dir: Path) -> bool:
    """Whether a folder is one of ``archive_previous``: its job is gone, its files are others'."""
    folder = run_dir.absolute()
    return folder.parent.name == PREVIOUS_FOLDER and bool(_STAMP.fullmatch(folder.name))


def _is_up_to(line: bytes, step: int) -> bool:
    if line.endswith(b"}\n") and (begin := _STEP.match(line)):
        return int(begin[1]) <= step  # a tenth of the time of decoding it
    values = decode_line(line.decode(errors="replace"))
    return values is not None and values["step"] <= step


def _plain(value: Any) -> Any:
    if isinstance(value, int):
        return value
    number = float(value)  # also numpy scalars and one-element tensors
    if math.isnan(number):
        return "NaN"
    if math.isinf(number):
        return "Infinity" if number > 0 else "-Infinity"
    return number
