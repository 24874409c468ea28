"""What a comparison found, as Markdown for people and JSON for programs."""

import json
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pltmoe.train.benchmark.timing import Ratio, Times, Work, quartiles


@dataclass(frozen=True)
class Goal:
    """Where a ratio, or an MFU, should lie."""

    at_most: float = math.inf
    at_least: float = 0.0

    def is_met_by(self, value: float) -> bool:
        """Whether ``value`` lies there."""
        return self.at_least <= value <= self.at_most

    def __str__(self) -> str:
        if self.at_most == math.inf:
            return f"at least {self.at_least:g}"
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
    mfu: float | None = None
    """Of the devices' peak in bf16; None where that is not known."""


@dataclass(frozen=True)
class Report:
    """One comparison."""

    compare: str
    title: str
    """Which time over which; what is measured, where nothing is compared."""
    goal: Goal
    """Of the ratio; of the MFU where nothing is compared."""
    ratio: Ratio | None
    rows: list[Row]
    setup: dict[str, Any]
    """What ran: sizes, layout, rounds."""
    where: dict[str, str]
    """Command, device, versions, commit."""
    notes: list[str]

    @property
    def goal_is_met(self) -> bool | None:
        """Whether what was measured reaches the goal; None where it could not be measured."""
        value = self.rows[0].mfu if self.ratio is None else self.ratio.median
        return None if value is None else self.goal.is_met_by(value)


def row(work: Work, times: Times, peak_flops: float | None = None) -> Row:
    """Sum up what was measured; ``peak_flops`` are FLOP/s of all devices together."""
    seconds = statistics.median(times.seconds)
    lower, _, upper = quartiles(times.seconds)
    return Row(
        work.name,
        seconds * 1e3,
        lower * 1e3,
        upper * 1e3,
        work.tokens / seconds,
        work.flops / seconds / 1e12,
        work.flops / seconds / peak_flops if peak_flops else None,
    )


def markdown(report: Report) -> str:
    """Return the report as one section."""
    lines = [
        f"## {report.compare}: {report.title}",
        "",
        _result(report),
        "",
        *_table(report.rows),
        "",
        *(f"- {name}: {value}" for name, value in {**report.setup, **report.where}.items()),
        *(f"- {note}" for note in report.notes),
    ]
    return "\n".join(lines) + "\n"


def _result(report: Report) -> str:
    met = {True: "met", False: "MISSED", None: "the device has no listed peak"}
    goal = f"goal {report.goal}: {met[report.goal_is_met]}."
    if (r := report.ratio) is None:
        mfu = report.rows[0].mfu
        return f"**MFU {'unknown' if mfu is None else f'{mfu:.1%}'}**, {goal}"
    processor = "" if r.of_cpu_time is None else f", of processor time {r.of_cpu_time:.3f}"
    return (
        f"**{r.median:.3f}**, {goal} The middle half of "
        f"the rounds lies between {r.lower_quartile:.3f} and {r.upper_quartile:.3f}; ratio of the "
        f"fastest rounds {r.of_fastest:.3f}{processor}."
    )


def write(report: Report, profiles: str, folder: Path) -> list[Path]:
    """Write ``folder/COMPARE.json``, ``.md`` and, if there are any, ``.profile.md``."""
    folder.mkdir(parents=True, exist_ok=True)
    tree: Mapping[str, Any] = {**asdict(report), "goal_is_met": report.goal_is_met}
    texts = {".json": json.dumps(tree, indent=2) + "\n", ".md": markdown(report)}
    if profiles:
        texts[".profile.md"] = profiles
    paths = [folder / f"{report.compare}{ending}" for ending in texts]
    for path, text in zip(paths, texts.values(), strict=True):
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
        os.replace(temporary, path)
    return paths


def _table(rows: Sequence[Row]) -> list[str]:
    lines = [
        "| | ms per step | middle half of the rounds | tokens/s | TFLOP/s | MFU |",
        "|---|---|---|---|---|---|",
    ]
    for r in rows:
        mfu = "-" if r.mfu is None else f"{r.mfu:.1%}"
        lines.append(
            f"| {r.name} | {r.milliseconds:,.1f} | {r.lower_quartile:,.1f} to "
            f"{r.upper_quartile:,.1f} | {r.tokens_per_second:,.0f} | {r.tflops:.3g} | {mfu} |"
        )
    return lines
