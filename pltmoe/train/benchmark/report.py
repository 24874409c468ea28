"""What a comparison found, as Markdown for people and JSON for programs."""

import json
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pltmoe.train.benchmark.timing import Ratio, Times, Work, quartiles


@dataclass(frozen=True)
class Goal:
    """Where a ratio should lie."""

    at_most: float
    at_least: float = 0.0

    def is_met_by(self, value: float) -> bool:
        """Whether ``value`` lies there."""
        return self.at_least <= value <= self.at_most

    def __str__(self) -> str:
        if self.at_least:
            return f"{self.at_least:g} to {self.at_most:g}"
        return f"at most {self.at_most:g}"


@dataclass(frozen=True)
class Row:
    """One line of the table: something measured, or predicted."""

    name: str
    milliseconds: float
    """Median of a step."""
    lower_quartile: float
    upper_quartile: float
    tokens_per_second: float
    tflops: float
    """10^12 FLOPs that the model must compute, per second."""


@dataclass(frozen=True)
class Report:
    """One comparison."""

    compare: str
    title: str
    """Which time over which."""
    goal: Goal
    ratio: Ratio
    rows: list[Row]
    setup: dict[str, Any]
    """What ran: sizes, layout, rounds."""
    where: dict[str, str]
    """Command, device, versions, commit."""
    notes: list[str]


def row(work: Work, times: Times) -> Row:
    """Sum up what was measured."""
    seconds = statistics.median(times.seconds)
    lower, _, upper = quartiles(times.seconds)
    return Row(
        work.name,
        seconds * 1e3,
        lower * 1e3,
        upper * 1e3,
        work.tokens / seconds,
        work.flops / seconds / 1e12,
    )


def markdown(report: Report) -> str:
    """Return the report as one section."""
    r, met = report.ratio, report.goal.is_met_by(report.ratio.median)
    processor = "" if r.of_cpu_time is None else f", of processor time {r.of_cpu_time:.3f}"
    lines = [
        f"## {report.compare}: {report.title}",
        "",
        f"**{r.median:.3f}**, goal {report.goal}: {'met' if met else 'MISSED'}. The middle half of "
        f"the rounds lies between {r.lower_quartile:.3f} and {r.upper_quartile:.3f}; ratio of the "
        f"fastest rounds {r.of_fastest:.3f}{processor}.",
        "",
        *_table(report.rows),
        "",
        *(f"- {name}: {value}" for name, value in {**report.setup, **report.where}.items()),
        *(f"- {note}" for note in report.notes),
    ]
    return "\n".join(lines) + "\n"


def write(report: Report, folder: Path) -> list[Path]:
    """Write ``folder/COMPARE.json`` and ``.md``; returns both paths."""
    folder.mkdir(parents=True, exist_ok=True)
    tree: Mapping[str, Any] = {
        **asdict(report),
        "goal_is_met": report.goal.is_met_by(report.ratio.median),
    }
    texts = {".json": json.dumps(tree, indent=2) + "\n", ".md": markdown(report)}
    paths = [folder / f"{report.compare}{ending}" for ending in texts]
    for path, text in zip(paths, texts.values(), strict=True):
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    return paths


def _table(rows: Sequence[Row]) -> list[str]:
    lines = [
        "| | ms per step | middle half of the rounds | tokens/s | TFLOP/s |",
        "|---|---|---|---|---|",
    ]
    for r in rows:
        lines.append(
            f"| {r.name} | {r.milliseconds:,.1f} | {r.lower_quartile:,.1f} to "
            f"{r.upper_quartile:,.1f} | {r.tokens_per_second:,.0f} | {r.tflops:.3g} |"
        )
    return lines
