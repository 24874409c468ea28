"""The harness' results as scores: a table to read, numbers to track, a file to keep."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pltmoe.evaluation.benchmarks import Benchmark


@dataclass(frozen=True)
class Score:
    """One number of one task."""

    task: str
    metric: str
    value: float
    error: float | None
    """Standard error, where the harness estimates one."""
    questions: int | None
    shots: int | None


def scores_of(results: dict[str, Any], benchmarks: Sequence[Benchmark]) -> list[Score]:
    """Return the scores of each benchmark: of its group where it has one, else of its tasks."""
    found = []
    for benchmark in benchmarks:
        groups = results.get("groups", {})
        rows = groups if benchmark.task in groups else results["results"]
        inside = results.get("group_subtasks", {}).get(benchmark.task, [])
        names = [benchmark.task] if benchmark.task in rows else [n for n in inside if n in rows]
        for name in names:
            found += _scores(name, rows[name], results)
    return found


def as_markdown(model: str, scores: Sequence[Score], limit: int | None) -> str:
    """Return a short table."""
    lines = [f"# Evaluation of {model}", ""]
    if limit is not None:
        lines += [f"Only the first {limit} questions of each task: not comparable.", ""]
    lines += ["| task | shots | metric | value | standard error | questions |"]
    lines += ["|---|---:|---|---:|---:|---:|"]
    for score in scores:
        error = "" if score.error is None else f"{score.error:.4f}"
        cells = [score.task, _text(score.shots), score.metric, f"{score.value:.4f}", error]
        lines.append(f"| {' | '.join([*cells, _text(score.questions)])} |")
    return "\n".join(lines) + "\n"


def as_metrics(scores: Sequence[Score]) -> dict[str, float]:
    """Return ``eval/TASK/METRIC`` for a tracker."""
    return {f"eval/{score.task}/{score.metric}": score.value for score in scores}


def write_results(results: dict[str, Any], scores: Sequence[Score], table: str, out: Path) -> Path:
    """Write the harness' JSON (with ``scores`` added) to ``out`` and the table beside it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    kept = results | {"scores": [vars(score) for score in scores]}
    out.write_text(json.dumps(kept, indent=1, default=str) + "\n", encoding="utf-8")
    table_file = out.with_suffix(".md")
    table_file.write_text(table, encoding="utf-8")
    return table_file


def _scores(name: str, row: dict[str, Any], results: dict[str, Any]) -> Any:
    questions = results.get("n-samples", {}).get(name, {}).get("effective")
    shots = results.get("n-shot", {}).get(name)
    for key, value in row.items():
        metric, comma, way = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = row.get(f"{metric}_stderr,{way}")
        error = float(error) if isinstance(error, int | float) else None
        # Some tasks extract the answer in several ways ("strict-match"): each is a score.
        label = metric if way == "none" else f"{metric}, {way}"
        yield Score(name, label, float(value), error, questions, shots)


def _text(value: int | None) -> str:
    return "" if value is None else f"{value:,}"
