"""Benchmark scores, as lm-evaluation-harness writes them (``results.json``)."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from pltmoe.errors import DataError
from pltmoe.evaluation.benchmarks import PAPER_MOE, by_task

_SHARES = ("acc", "exact_match", "math_verify", "pass@1", "pass_at_1", "f1", "em", "acc_norm")
"""Metrics between 0 and 1 that may be averaged. The paper's benchmarks have their own
metric each; of other tasks with several, the first of these counts."""

PAPER_TASKS = tuple(benchmark.task for benchmark in PAPER_MOE)
"""The ten benchmarks that the paper averages."""


@dataclass(frozen=True)
class Score:
    """One task's number."""

    metric: str
    value: float
    error: float | None
    """Standard error, if the harness gave one."""
    shots: int | None

    @property
    def is_share(self) -> bool:
        """Whether it is a share of right answers, shown in percent."""
        return self.metric in _SHARES


@dataclass(frozen=True)
class Evaluation:
    """The scores of one model."""

    source: str
    tasks: Mapping[str, Score]
    limit: float | None = None
    """Samples (or share of them) per task, when not all were run."""

    def average(self, tasks: Sequence[str]) -> float:
        """Return the mean over ``tasks`` in percent, as the paper's average."""
        return 100 * fmean(self.tasks[task].value for task in tasks)


def read_evaluation(path: Path) -> Evaluation:
    """Read a results file, or the newest one in the folder that the harness has written.

    Raises:
        DataError: unreadable, or without scores.
    """
    if path.is_dir():
        found = sorted(path.rglob("results*.json"), key=lambda file: file.stat().st_mtime)
        if not found:
            raise DataError(f"{path}: no results*.json in this folder; give a results file")
        path = found[-1]
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a results file that can be read ({error})") from None
    results = tree.get("results") if isinstance(tree, dict) else None
    if not isinstance(results, dict):
        raise DataError(f"{path}: no 'results' of lm-evaluation-harness in it; evaluate again")
    shots = tree.get("n-shot") or {}
    chosen = {task: _score(task, entry, shots) for task, entry in results.items()}
    chosen |= {task: _score(task, e, shots) for task, e in (tree.get("groups") or {}).items()}
    known = {task: score for task, score in chosen.items() if score is not None}
    shown = dict.fromkeys(_shown(known, tree.get("group_subtasks") or {}))
    if not shown:
        raise DataError(f"{path}: not one task has a score; look at the evaluation's log")
    limit = (tree.get("config") or {}).get("limit")
    return Evaluation(str(path), {task: known[task] for task in shown}, limit)


def common_tasks(evaluations: Sequence[Evaluation]) -> list[str]:
    """Return the tasks to average: those with a share of right answers that all have, run alike.

    Where the paper's ten benchmarks are among them, only those.
    """
    if not evaluations:
        return []
    tasks = [
        task
        for task, score in evaluations[0].tasks.items()
        if score.is_share and all(task in other.tasks for other in evaluations)
    ]
    unlike = unlike_tasks(evaluations)
    tasks = [task for task in tasks if task not in unlike]
    return list(PAPER_TASKS) if set(PAPER_TASKS) <= set(tasks) else tasks


def unlike_tasks(evaluations: Sequence[Evaluation]) -> list[str]:
    """Return the tasks whose scores are not comparable: other shots or another metric."""
    ways: dict[str, set[tuple[str, int | None]]] = {}
    for evaluation in evaluations:
        for task, score in evaluation.tasks.items():
            ways.setdefault(task, set()).add((score.metric, score.shots))
    return [task for task, found in ways.items() if len(found) > 1]


def _score(task: str, entry: Any, shots: Mapping[str, Any]) -> Score | None:
    """Pick a task's headline number: ``"acc,none": 0.5`` and ``"acc_stderr,none": 0.01``."""
    if not isinstance(entry, dict):
        return None
    numbers = {
        key: value
        for key, value in entry.items()
        if isinstance(value, int | float) and "," in key and math.isfinite(value)
    }
    names = [key for key in numbers if "_stderr," not in key]
    if not names:
        return None

    known = by_task().get(task)

    def rank(key: str) -> int:
        metric = key.partition(",")[0]
        if known is not None and metric == known.metric:
            return -1
        return _SHARES.index(metric) if metric in _SHARES else len(_SHARES)

    best = min(names, key=rank)  # of equals, the first
    metric, _, kind = best.partition(",")
    error = numbers.get(f"{metric}_stderr,{kind}")
    asked = shots.get(task)
    return Score(metric, float(numbers[best]), error, asked if isinstance(asked, int) else None)


def _shown(known: Mapping[str, Score], groups: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """Yield each task once: a group with a score of its own, or what it consists of."""
    inside = {child for children in groups.values() for child in children}

    def below(task: str) -> Iterator[str]:
        if task in known:
            yield task
            return
        for child in groups.get(task, ()):
            yield from below(child)

    for task in [*groups, *known]:
        if task not in inside:
            yield from below(task)
