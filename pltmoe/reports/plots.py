"""Loss and cost of runs as pictures, each with the CSV behind it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from pltmoe.reports.numbers import scale_of, significant
from pltmoe.reports.runs import Run
from pltmoe.reports.scores import Score
from pltmoe.reports.style import (
    COLOURS,
    DETAIL_SHARE,
    MARKERS,
    STYLE,
    line_style,
    save,
    token_label,
    write_csv,
)

_SMOOTH_FROM = 150
"""Training curves with more points than this are drawn faint, with a running mean on top."""
_MOST_MARKERS = 40
"""Of validations, the last among them: more would hide the curves."""
_START_SHARE = 0.06
"""Share of the training whose steep fall may leave the top of the loss axis."""


@dataclass(frozen=True)
class Bars:
    """One small chart of a value per run."""

    title: str
    """What, with its unit."""
    values: Sequence[float | None]
    """One per run; None: not measured."""
    from_zero: bool = True
    """Bars from zero; False: dots on an axis that shows small differences."""


def plot_losses(runs: Sequence[Run], path: Path, title: str) -> None:
    """Draw training and validation loss against tokens and training FLOPs.

    Writes ``path`` (PNG) and the same name with .csv.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(13.5, 4.8), layout="constrained")
        whole, end, work = figure.subplots(1, 3)
        work.sharey(whole)
        _loss_panel(whole, runs, "tokens")
        _loss_panel(end, runs, "tokens")
        _loss_panel(work, runs, "flops")
        whole.set_title("at equal data")
        whole.set_ylabel("loss (nats per token)")
        end.set_title("the end of it, enlarged")
        work.set_title("at equal work")
        _clip_start(whole, runs)
        _only_the_end(end, runs)
        _legend(figure, runs)
        figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
        save(figure, path)
    write_csv(path.with_suffix(".csv"), _loss_rows(runs))


def plot_costs(labels: Sequence[str], charts: Sequence[Bars], path: Path) -> None:
    """Draw small charts side by side, one row per label in each. Writes PNG and CSV."""
    with matplotlib.rc_context(STYLE):
        size = (3.7 * len(charts), 0.9 + 0.5 * len(labels))
        figure = Figure(figsize=size, layout="constrained")
        for axis, chart in zip(figure.subplots(1, len(charts)), charts, strict=True):
            _bar_panel(axis, chart)
            axis.set_yticks(range(len(labels)), labels if chart is charts[0] else [])
            axis.set_title(chart.title, fontsize=10)
        save(figure, path)
    rows: list[list[Any]] = [["run", *(chart.title for chart in charts)]]
    for index, label in enumerate(labels):
        values = [chart.values[index] for chart in charts]
        rows.append([label, *("" if value is None else value for value in values)])
    write_csv(path.with_suffix(".csv"), rows)


def plot_scores(
    tasks: Sequence[str],
    labels: Sequence[str],
    scores: Sequence[Sequence[Score]],
    colours: Sequence[int],
    path: Path,
) -> None:
    """Draw benchmark scores in percent: a group of bars per task, a bar per model.

    ``colours`` are the models' places among all runs, so that a run keeps its colour. Writes PNG
    and CSV.
    """
    height = 0.8 / len(labels)
    with matplotlib.rc_context(STYLE):
        size = (8.5, 1.4 + len(tasks) * (0.25 + 0.22 * len(labels)))
        figure = Figure(figsize=size, layout="constrained")
        axis = figure.subplots()
        for row, (label, values, place) in enumerate(zip(labels, scores, colours, strict=True)):
            ys = [task + (row - (len(labels) - 1) / 2) * height for task in range(len(tasks))]
            shares = [100 * score.value for score in values]
            errors = [100 * (score.error or 0.0) for score in values]
            colour = COLOURS[place % len(COLOURS)]
            axis.barh(ys, shares, 0.9 * height, xerr=errors, color=colour, label=label)
            for y, share, error in zip(ys, shares, errors, strict=True):
                axis.text(share + error + 1, y, f"{share:.1f}", va="center", fontsize=8)
        axis.set_yticks(range(len(tasks)), tasks)
        axis.set_ylim(len(tasks) - 0.5, -0.5)
        axis.set_xlim(0, 108)
        axis.set_xlabel("score (%), with standard error")
        axis.grid(False, axis="y")
        figure.legend(loc="outside lower center", ncols=min(4, len(labels)))
        figure.suptitle("Benchmark scores", x=0.01, ha="left", fontsize=13, fontweight="bold")
        save(figure, path)
    rows: list[list[Any]] = [["run", "task", "metric", "value", "standard error"]]
    for label, values in zip(labels, scores, strict=True):
        for task, s in zip(tasks, values, strict=True):
            rows.append([label, task, s.metric, s.value, "" if s.error is None else s.error])
    write_csv(path.with_suffix(".csv"), rows)


def _loss_rows(runs: Sequence[Run]) -> list[list[Any]]:
    rows: list[list[Any]] = [["run", "kind", "step", "tokens", "flops", "loss"]]
    for run in runs:
        for metric in ("train/loss", "valid/loss"):
            kind = metric.partition("/")[0]
            rows += [
                [run.name, kind, p.step, p.tokens, p.flops, p.value] for p in run.series(metric)
            ]
    return rows


def _loss_panel(axis: Axes, runs: Sequence[Run], quantity: str) -> None:
    largest = max(getattr(p, quantity) for run in runs for p in run.series("train/loss"))
    divisor, prefix = scale_of(largest)
    for index, run in enumerate(runs):
        style = line_style(index)
        train, valid = run.series("train/loss"), run.series("valid/loss")
        x = np.array([getattr(p, quantity) for p in train]) / divisor
        y = np.array([p.value for p in train], dtype=float)
        if len(y) > _SMOOTH_FROM:
            axis.plot(x, y, color=style["color"], alpha=0.2, linewidth=0.8)
            y = _running_mean(y, len(y) // 50)
        axis.plot(x, y, color=style["color"], linestyle=style["linestyle"], linewidth=1.6)
        x = np.array([getattr(p, quantity) for p in valid]) / divisor
        every = 1 + len(valid) // (_MOST_MARKERS + 1)
        marks = list(range(len(valid)))[::-every]
        axis.plot(x, [p.value for p in valid], **style | {"linestyle": "none"}, markevery=marks)
    label = f"training compute ({prefix}FLOP)"
    axis.set_xlabel(label if quantity == "flops" else token_label(prefix))
    axis.set_xlim(left=0)
    axis.margins(x=0.03)


def _only_the_end(axis: Axes, runs: Sequence[Run]) -> None:
    """Show the last part of the training larger: runs differ little there."""
    divisor, _ = scale_of(max(p.tokens for run in runs for p in run.series("train/loss")))
    end = max(run.tokens for run in runs)
    late = [
        p.value
        for run in runs
        for p in run.series("train/loss") + run.series("valid/loss")
        if p.tokens >= (1 - DETAIL_SHARE) * end and np.isfinite(p.value)
    ]
    axis.set_xlim((1 - DETAIL_SHARE) * end / divisor, (1 + 0.04 * DETAIL_SHARE) * end / divisor)
    if late and min(late) < max(late):
        room = 0.08 * (max(late) - min(late))
        axis.set_ylim(min(late) - room, max(late) + room)


def _clip_start(axis: Axes, runs: Sequence[Run]) -> None:
    """Give the steep first steps less room than the part where runs differ."""
    all_values, later = [], []
    for run in runs:
        train = run.series("train/loss")
        end = train[-1].tokens
        all_values += [p.value for p in train + run.series("valid/loss") if np.isfinite(p.value)]
        later += [p.value for p in train if p.tokens >= _START_SHARE * end and np.isfinite(p.value)]
    if not later:
        return
    low, high = min(all_values), max(later)
    room = 0.06 * (high - low) or 0.1
    axis.set_ylim(low - room, high + room)
    if max(all_values) > high + room:
        text = f"from {max(all_values):.1f} at the first steps"
        axis.text(0.1, 1.0, text, transform=axis.transAxes, ha="left", va="top", fontsize=8)


def _running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Mean over ``width`` points around each, fewer at the ends."""
    ones = np.convolve(np.ones_like(values), np.ones(width), mode="same")
    return np.convolve(values, np.ones(width), mode="same") / ones


def _bar_panel(axis: Axes, chart: Bars) -> None:
    measured = [value for value in chart.values if value is not None]
    known = [value for value in measured if np.isfinite(value)] or [1.0]
    room = max(known) if chart.from_zero else max(max(known) - min(known), 1e-3 * max(known))
    for row, value in enumerate(chart.values):
        colour = COLOURS[row % len(COLOURS)]
        if value is None or not np.isfinite(value):
            text = "not run" if value is None else str(value)
            axis.text(0.02, row, text, transform=axis.get_yaxis_transform(), va="center")
            continue
        if chart.from_zero:
            axis.barh(row, value, color=colour, height=0.62)
        else:
            axis.plot(value, row, color=colour, marker=MARKERS[row % len(MARKERS)], markersize=9)
        text = significant(value, 4)
        axis.text(value + (0.02 if chart.from_zero else 0.07) * room, row, text, va="center")
    axis.set_ylim(len(chart.values) - 0.5, -0.5)
    low = 0.0 if chart.from_zero else min(known) - 0.25 * room
    axis.set_xlim(low, max(known) + (0.3 if chart.from_zero else 0.6) * room)
    axis.xaxis.set_major_locator(MaxNLocator(4))
    axis.grid(False, axis="y")


def _legend(figure: Figure, runs: Sequence[Run]) -> None:
    handles = [Line2D([], [], **line_style(i), label=run.name) for i, run in enumerate(runs)]
    title = "line: training, marker: validation"
    figure.legend(
        handles=handles, title=title, loc="outside lower center", ncols=4, handlelength=3.4
    )
