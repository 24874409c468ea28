"""Heat maps over the training: a row per loop and layer, a colour per value."""

from collections.abc import Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pltmoe.reports.numbers import scale_of
from pltmoe.reports.runs import Point, Run
from pltmoe.reports.style import STYLE, save, token_label, write_csv

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
MOST_COLUMNS = 6
"""Panels side by side that can still be read on a page."""


def plot_heat_maps(runs: Sequence[Run], path: Path) -> bool:
    """Draw load balance, expert overlap and gate means per loop and layer over the training.

    One panel per quantity and run that has it, ``MOST_COLUMNS`` side by side. Writes PNG and CSV.
    Returns whether there was something to draw.
    """
    shown = [heat for heat in HEAT_MAPS if any(run.by_loop_and_layer(heat[0]) for run in runs)]
    if not shown:
        return False
    panels = {heat: [r for r in runs if r.by_loop_and_layer(heat[0])] for heat in shown}
    width = min(MOST_COLUMNS, max(len(having) for having in panels.values()))
    strips = _packed(panels, width)
    heights = [ceil(len(panels[strip[0]]) / width) for strip in strips]
    with matplotlib.rc_context(STYLE | {"axes.grid": False}):
        figure = Figure(figsize=(0.8 + 3.7 * width, 2.6 * sum(heights)), layout="constrained")
        areas = figure.subfigures(len(strips), 1, height_ratios=heights, squeeze=False)[:, 0]
        for area, strip in zip(areas, strips, strict=True):
            counts = [min(width, len(panels[heat])) for heat in strip]
            spare = width - sum(counts)
            parts = area.subfigures(
                1,
                len(strip) + bool(spare),
                width_ratios=[*counts, spare] if spare else counts,
                squeeze=False,
            )[0]
            for part, heat in zip(parts, strip, strict=False):
                _heat_group(part, panels[heat], heat)
        save(figure, path)
    write_csv(path.with_suffix(".csv"), _heat_rows(runs))
    return True


def _heat_rows(runs: Sequence[Run]) -> list[list[Any]]:
    rows: list[list[Any]] = [["run", "metric", "loop", "layer", "step", "tokens", "value"]]
    for metric, *_ in HEAT_MAPS:
        for run in runs:
            for (loop, layer), points in run.by_loop_and_layer(metric).items():
                rows += [[run.name, metric, loop, layer, p.step, p.tokens, p.value] for p in points]
    return rows


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
    """Put quantities side by side in their order while ``width`` panels hold them.

    One that has more panels than that stands alone and takes several rows.
    """
    strips: list[list[Heat]] = []
    for heat, having in panels.items():
        if strips and sum(len(panels[other]) for other in strips[-1]) + len(having) <= width:
            strips[-1].append(heat)
        else:
            strips.append([heat])
    return strips


def _heat_group(part: Any, having: Sequence[Run], heat: Heat) -> None:
    """Draw one quantity: a panel for each run that has it, one colour scale for all."""
    metric, title, unit, colours = heat
    part.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    columns = min(MOST_COLUMNS, len(having))
    axes = part.subplots(ceil(len(having) / columns), columns, squeeze=False).flatten()
    low, high = _colour_range(having, metric)
    for axis, run in zip(axes, having, strict=False):
        image = _heat_panel(axis, run, metric, colours, low, high)
    for axis in axes[len(having) :]:
        axis.set_axis_off()
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
    axis.set_xlabel(token_label(prefix))
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
