"""Pictures of runs, each with the CSV behind it.

Colours are Okabe and Ito's, which people with any colour vision tell apart; lines and markers
differ in shape as well.
"""

import csv
from collections.abc import Mapping, Sequence
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
from pltmoe.reports.runs import Point, Run

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_LINES = ("-", (0, (5, 1.5)), (0, (1.5, 1)), (0, (5, 1.5, 1, 1.5)))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_INK, _GRID = "#222222", "#dddddd"
_STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": "#888888",
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.7,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
    "savefig.dpi": 160,
    "figure.facecolor": "white",
}
_SMOOTH_FROM = 150
"""Training curves with more points than this are drawn faint, with a running mean on top."""
_DETAIL_SHARE = 0.35
"""Share of the training, at its end, that is shown enlarged."""
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


Heat = tuple[str, str, str, str]
HEAT_MAPS: tuple[Heat, ...] = (
    ("moe/load_imbalance", "Load imbalance", "busiest expert / mean (1 = even)", "viridis"),
    (
        "moe/expert_overlap",
        "Expert overlap with loop 1",
        "share of experts picked again",
        "cividis",
    ),
    ("plt/gate_mean", "G-SWA gate", "weight of the local window", "PuOr"),
)
"""Metric, title, unit, colour map; the gate's map is centred on 0.5, its initial value."""


def plot_losses(runs: Sequence[Run], path: Path, title: str) -> list[list[Any]]:
    """Draw training and validation loss against tokens and training FLOPs.

    Writes ``path`` (PNG) and the same name with .csv; returns the rows of the CSV.
    """
    rows = _loss_rows(runs)
    with matplotlib.rc_context(_STYLE):
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
        _save(figure, path)
    write_csv(path.with_suffix(".csv"), rows)
    return rows


def plot_heat_maps(runs: Sequence[Run], path: Path) -> list[list[Any]]:
    """Draw load balance, expert overlap and gate means per loop and layer over the training.

    One row of panels per quantity, one column per run that has it. Writes PNG and CSV; returns the
    CSV's rows. Draws nothing, and returns the header only, when no run logged any of them.
    """
    rows = _heat_rows(runs)
    shown = [heat for heat in HEAT_MAPS if any(run.by_loop_and_layer(heat[0]) for run in runs)]
    if not shown:
        return rows
    panels = {heat: [r for r in runs if r.by_loop_and_layer(heat[0])] for heat in shown}
    width = max(len(having) for having in panels.values())
    strips = _packed(panels, width)
    with matplotlib.rc_context(_STYLE | {"axes.grid": False}):
        figure = Figure(figsize=(0.8 + 3.7 * width, 2.6 * len(strips)), layout="constrained")
        for area, strip in zip(_areas(figure, len(strips), 1), strips, strict=True):
            counts = [len(panels[heat]) for heat in strip]
            spare = width - sum(counts)
            parts = area.subfigures(
                1,
                len(strip) + bool(spare),
                width_ratios=[*counts, spare] if spare else counts,
                squeeze=False,
            )[0]
            for part, heat in zip(parts, strip, strict=False):
                _heat_group(part, panels[heat], heat)
        _save(figure, path)
    write_csv(path.with_suffix(".csv"), rows)
    return rows


def plot_costs(labels: Sequence[str], charts: Sequence[Bars], path: Path) -> None:
    """Draw small charts side by side, one row per label in each. Writes PNG and CSV."""
    with matplotlib.rc_context(_STYLE):
        size = (3.7 * len(charts), 0.9 + 0.5 * len(labels))
        figure = Figure(figsize=size, layout="constrained")
        for axis, chart in zip(figure.subplots(1, len(charts)), charts, strict=True):
            _bar_panel(axis, chart)
            axis.set_yticks(range(len(labels)), labels if chart is charts[0] else [])
            axis.set_title(chart.title, fontsize=10)
        _save(figure, path)
    rows: list[list[Any]] = [["run", *(chart.title for chart in charts)]]
    for index, label in enumerate(labels):
        values = [chart.values[index] for chart in charts]
        rows.append([label, *("" if value is None else value for value in values)])
    write_csv(path.with_suffix(".csv"), rows)


def write_csv(path: Path, rows: Sequence[Sequence[Any]]) -> None:
    """Write rows, floats with all their digits, through a temporary name."""
    new = path.with_name(path.name + ".new")
    with new.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
    new.replace(path)


def _loss_rows(runs: Sequence[Run]) -> list[list[Any]]:
    rows: list[list[Any]] = [["run", "kind", "step", "tokens", "flops", "loss"]]
    for run in runs:
        for metric in ("train/loss", "valid/loss"):
            kind = metric.partition("/")[0]
            rows += [
                [run.name, kind, p.step, p.tokens, p.flops, p.value] for p in run.series(metric)
            ]
    return rows


def _heat_rows(runs: Sequence[Run]) -> list[list[Any]]:
    rows: list[list[Any]] = [["run", "metric", "loop", "layer", "step", "tokens", "value"]]
    for metric, *_ in HEAT_MAPS:
        for run in runs:
            for (loop, layer), points in run.by_loop_and_layer(metric).items():
                rows += [[run.name, metric, loop, layer, p.step, p.tokens, p.value] for p in points]
    return rows


def _loss_panel(axis: Axes, runs: Sequence[Run], quantity: str) -> None:
    largest = max(getattr(p, quantity) for run in runs for p in run.series("train/loss"))
    divisor, prefix = scale_of(largest)
    for index, run in enumerate(runs):
        style = _style(index)
        train, valid = run.series("train/loss"), run.series("valid/loss")
        x = np.array([getattr(p, quantity) for p in train]) / divisor
        y = np.array([p.value for p in train], dtype=float)
        if len(y) > _SMOOTH_FROM:
            axis.plot(x, y, color=style["color"], alpha=0.2, linewidth=0.8)
            y = _running_mean(y, len(y) // 50)
        axis.plot(x, y, color=style["color"], linestyle=style["linestyle"], linewidth=1.6)
        x = np.array([getattr(p, quantity) for p in valid]) / divisor
        axis.plot(x, [p.value for p in valid], **style | {"linestyle": "none"})
    label = f"training compute ({prefix}FLOP)"
    axis.set_xlabel(label if quantity == "flops" else _token_label(prefix))
    axis.set_xlim(left=0)
    axis.margins(x=0.03)


def _style(index: int) -> dict[str, Any]:
    """Line and marker of the run at ``index``."""
    colour = COLOURS[index % len(COLOURS)]
    return {
        "color": colour,
        "linestyle": _LINES[index % len(_LINES)],
        "marker": _MARKERS[index % len(_MARKERS)],
        "markersize": 6,
        "markerfacecolor": "white",
        "markeredgecolor": colour,
        "markeredgewidth": 1.5,
    }


def _legend(figure: Figure, runs: Sequence[Run]) -> None:
    handles = [Line2D([], [], **_style(i), label=run.name) for i, run in enumerate(runs)]
    title = "line: training, marker: validation"
    figure.legend(
        handles=handles, title=title, loc="outside lower center", ncols=4, handlelength=3.4
    )


def _only_the_end(axis: Axes, runs: Sequence[Run]) -> None:
    """Show the last part of the training larger: runs differ little there."""
    divisor, _ = scale_of(max(p.tokens for run in runs for p in run.series("train/loss")))
    end = max(run.tokens for run in runs)
    late = [
        p.value
        for run in runs
        for p in run.series("train/loss") + run.series("valid/loss")
        if p.tokens >= (1 - _DETAIL_SHARE) * end and np.isfinite(p.value)
    ]
    axis.set_xlim((1 - _DETAIL_SHARE) * end / divisor, (1 + 0.04 * _DETAIL_SHARE) * end / divisor)
    if late and min(late) < max(late):
        room = 0.08 * (max(late) - min(late))
        axis.set_ylim(min(late) - room, max(late) + room)


def _token_label(prefix: str) -> str:
    words = {"k": "thousand ", "M": "million ", "G": "billion ", "T": "trillion "}
    return f"training tokens ({words[prefix].strip()})" if prefix else "training tokens"


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


def _colour_range(runs: Sequence[Run], metric: str) -> tuple[float, float]:
    values = [p.value for run in runs for s in run.by_loop_and_layer(metric).values() for p in s]
    finite = np.array([v for v in values if np.isfinite(v)] or [0.0])
    if metric == "plt/gate_mean":
        reach = max(0.02, float(np.abs(finite - 0.5).max()))
        return 0.5 - reach, 0.5 + reach
    # A few extreme first steps would leave one colour for all the rest.
    low, high = float(finite.min()), float(np.quantile(finite, 0.98))
    return (1.0 if metric == "moe/load_imbalance" else low), max(high, low + 1e-6)


def _packed(panels: Mapping[Heat, Sequence[Run]], width: int) -> list[list[Heat]]:
    """Put quantities into rows of ``width`` panels, in their order."""
    strips: list[list[Heat]] = [[]]
    for heat, having in panels.items():
        if sum(len(panels[other]) for other in strips[-1]) + len(having) > width:
            strips.append([])
        strips[-1].append(heat)
    return strips


def _areas(figure: Figure, rows: int, columns: int) -> list[Any]:
    return list(figure.subfigures(rows, columns, squeeze=False)[:, 0])


def _heat_group(part: Any, having: Sequence[Run], heat: Heat) -> None:
    """Draw one quantity: a panel for each run that has it, one colour scale for all."""
    metric, title, unit, colours = heat
    part.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    axes = part.subplots(1, len(having), squeeze=False)[0]
    low, high = _colour_range(having, metric)
    for axis, run in zip(axes, having, strict=True):
        image = _heat_panel(axis, run, metric, colours, low, high)
    bar = part.colorbar(image, ax=list(axes), pad=0.015, aspect=14)
    bar.set_label(unit, fontsize=9)


def _heat_panel(axis: Axes, run: Run, metric: str, colours: str, low: float, high: float) -> Any:
    series = run.by_loop_and_layer(metric)
    places = sorted(series)
    first: list[Point] = series[places[0]]
    divisor, prefix = scale_of(first[-1].tokens)
    grid = np.full((len(places), len(first)), np.nan)
    column = {point.step: i for i, point in enumerate(first)}
    for row, place in enumerate(places):
        for point in series[place]:
            if point.step in column:
                grid[row, column[point.step]] = point.value
    edges = _edges(np.array([p.tokens for p in first]) / divisor)
    image = axis.pcolormesh(
        edges, np.arange(len(places) + 1), grid, cmap=colours, vmin=low, vmax=high, rasterized=True
    )
    axis.invert_yaxis()
    _name_places(axis, places)
    axis.set_title(run.name, fontsize=10, fontweight="normal")
    axis.set_xlabel(_token_label(prefix))
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)
    return image


def _name_places(axis: Axes, places: list[tuple[int, int]]) -> None:
    """Layers as ticks (not more than fit), loops as brackets of their own with a white line."""
    loops = sorted({loop for loop, _ in places})
    layers = max(layer for _, layer in places)
    every = max(1, round(layers * len(loops) / 12))
    shown = [(row, layer) for row, (_, layer) in enumerate(places) if (layer - 1) % every == 0]
    axis.set_yticks([row + 0.5 for row, _ in shown], [str(layer) for _, layer in shown], fontsize=8)
    for loop in loops:
        rows = [row for row, place in enumerate(places) if place[0] == loop]
        middle = (rows[0] + rows[-1] + 1) / 2
        axis.annotate(
            f"loop {loop}, layer",
            (0, middle),
            xycoords=axis.get_yaxis_transform(),
            xytext=(-24, 0),  # beside tick labels of two digits
            textcoords="offset points",
            rotation=90,
            ha="center",
            va="center",
            fontsize=8,
        )
        if rows[0]:
            axis.axhline(rows[0], color="white", linewidth=2.5)


def _edges(centres: np.ndarray) -> np.ndarray:
    if len(centres) == 1:
        return np.array([0.0, 2 * centres[0] or 1.0])
    middles = (centres[1:] + centres[:-1]) / 2
    first = max(0.0, centres[0] - (middles[0] - centres[0]))
    return np.concatenate([[first], middles, [centres[-1] + (centres[-1] - middles[-1])]])


def _bar_panel(axis: Axes, chart: Bars) -> None:
    known = [value for value in chart.values if value is not None] or [1.0]
    room = max(known) if chart.from_zero else max(max(known) - min(known), 1e-3 * max(known))
    for row, value in enumerate(chart.values):
        colour = COLOURS[row % len(COLOURS)]
        if value is None:
            axis.text(0.02, row, "not measured", transform=axis.get_yaxis_transform(), va="center")
            continue
        if chart.from_zero:
            axis.barh(row, value, color=colour, height=0.62)
        else:
            axis.plot(value, row, color=colour, marker=_MARKERS[row % len(_MARKERS)], markersize=9)
        text = significant(value, 4)
        axis.text(value + (0.02 if chart.from_zero else 0.07) * room, row, text, va="center")
    axis.set_ylim(len(chart.values) - 0.5, -0.5)
    low = 0.0 if chart.from_zero else min(known) - 0.25 * room
    axis.set_xlim(low, max(known) + (0.3 if chart.from_zero else 0.6) * room)
    axis.xaxis.set_major_locator(MaxNLocator(4))
    axis.grid(False, axis="y")


def _save(figure: Figure, path: Path) -> None:
    """Write the picture through a temporary name; a Figure of its own needs no display."""
    new = path.with_name(path.name + ".new")
    figure.savefig(new, format="png")
    new.replace(path)
