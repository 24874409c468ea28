"""Metrics over the training as small line charts side by side, with the CSV behind them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from pltmoe.reports.numbers import scale_of
from pltmoe.reports.runs import Run
from pltmoe.reports.style import COLOURS, LINES, MARKERS, STYLE, save, token_label, write_csv

_COLUMNS = 4


@dataclass(frozen=True)
class Chart:
    """One metric."""

    metric: str
    title: str
    unit: str
    """Label of the value axis."""
    missing: str = "not logged by any of the runs"
    """What an empty chart says."""
    from_zero: bool = False
    level: float | None = None
    """A value to mark with a thin line."""
    factor: float = 1.0


SPEED = (
    Chart(
        "perf/tokens_per_second_per_gpu",
        "Throughput",
        "training tokens/s per device",
        from_zero=True,
    ),
    Chart("perf/tflops_per_gpu", "Work done", "TFLOP/s per device (model FLOPs)", from_zero=True),
    Chart(
        "perf/mfu",
        "MFU",
        "% of the device's peak",
        "not known:\nthese devices have no listed peak",
        from_zero=True,
        factor=100,
    ),
    Chart("memory/peak_gib", "Peak memory", "GiB, highest of all ranks", from_zero=True),
)
ROUTING = (
    Chart("moe/load_imbalance", "Expert balance", "busiest expert / mean (1 = even)", level=1.0),
    Chart(
        "moe/expert_overlap",
        "Expert overlap",
        "share of loop 1's experts picked again",
        "does not apply:\nno run has several loops of experts",
    ),
    Chart(
        "plt/gate_mean",
        "G-SWA gate",
        "weight of the local window",
        "does not apply:\nno run has G-SWA",
        level=0.5,
    ),
)
DIAGNOSTICS = (
    Chart("plt/update_size", "Size of a loop's update", "|H(l) - H(l-1)| / |H(l-1)|"),
    Chart(
        "plt/update_cosine",
        "Its direction",
        "cosine to H(l-1)",
        level=0.0,
    ),
    Chart(
        "plt/update_turn",
        "Against the update before",
        "cosine of the two updates",
        "does not apply:\nfrom three loops on",
        level=0.0,
    ),
    Chart(
        "plt/slot_distance",
        "Cost of the shift: distance",
        "|h[i] - h[i-1]| / |h[i]|",
        "does not apply:\nno run shifts between loops",
    ),
    Chart(
        "plt/slot_cosine",
        "Cost of the shift: cosine",
        "cosine of h[i] and h[i-1]",
        "does not apply:\nno run shifts between loops",
    ),
)


def plot_curves(runs: Sequence[Run], charts: Sequence[Chart], path: Path, title: str) -> int:
    """Draw metrics over tokens: a colour per run, a line per loop. Writes PNG and CSV.

    Charts that no run has say so. Returns how many charts have a line; draws nothing for none.
    """
    drawn = [chart for chart in charts if any(_lines(run, chart) for run in runs)]
    if not drawn:
        return 0
    columns = min(_COLUMNS, len(charts)) if len(charts) != 5 else 3
    rows = math.ceil(len(charts) / columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.9 * columns, 0.9 + 3.0 * rows), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.1)
        axes = figure.subplots(rows, columns, squeeze=False).flatten()
        for axis, chart in zip(axes, charts, strict=False):
            _draw(axis, runs, chart)
        for axis in axes[len(charts) :]:
            axis.set_visible(False)
        _legend(figure, runs, drawn)
        figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
        save(figure, path)
    _write_rows(runs, charts, path.with_suffix(".csv"))
    return len(drawn)


def _lines(run: Run, chart: Chart) -> list[int]:
    """Return the loops (0: not by loop) that a run has a line for."""
    by_loop = range(1, run.config.model.num_loops + 1)
    found = [loop for loop in by_loop if run.has(f"{chart.metric}/loop_{loop}")]
    return [0] if not found and run.has(chart.metric) else found


def _series(run: Run, chart: Chart, loop: int) -> list[Any]:
    return run.series(f"{chart.metric}/loop_{loop}" if loop else chart.metric)


def _draw(axis: Axes, runs: Sequence[Run], chart: Chart) -> None:
    axis.set_title(chart.title, fontsize=11)
    axis.set_ylabel(chart.unit, fontsize=9)
    divisor, prefix = scale_of(max(run.tokens for run in runs))
    is_empty = True
    for index, run in enumerate(runs):
        for loop in _lines(run, chart):
            is_empty = False
            points = _series(run, chart, loop)
            style = _style(index, loop)
            if len(points) < 60:
                style |= {"marker": MARKERS[index % len(MARKERS)], "markersize": 3.5}
            y = [point.value * chart.factor for point in points]
            axis.plot([point.tokens / divisor for point in points], y, **style)
    if is_empty:
        axis.set(xticks=[], yticks=[], ylabel="")
        axis.spines[:].set_visible(False)
        axis.text(
            0.5, 0.5, chart.missing, transform=axis.transAxes, ha="center", va="center", alpha=0.75
        )
        return
    if chart.level is not None:
        axis.axhline(chart.level, color="#888888", linewidth=0.8, zorder=1)
    axis.set_xlabel(token_label(prefix), fontsize=9)
    axis.set_xlim(left=0)
    if chart.from_zero:
        axis.set_ylim(0, axis.get_ylim()[1] * 1.05)


def _style(index: int, loop: int) -> dict[str, Any]:
    line = LINES[(max(loop, 1) - 1) % len(LINES)]
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": line, "linewidth": 1.6}


def _legend(figure: Figure, runs: Sequence[Run], charts: Sequence[Chart]) -> None:
    having = [(i, r) for i, r in enumerate(runs) if any(_lines(r, chart) for chart in charts)]
    handles = [
        Line2D([], [], **_style(i, 1), marker=MARKERS[i % len(MARKERS)], markersize=5, label=r.name)
        for i, r in having
    ]
    loops = sorted({loop for _, r in having for chart in charts for loop in _lines(r, chart)})
    if loops != [0]:
        handles += [
            Line2D([], [], **_style(0, loop) | {"color": "#555555"}, label=f"loop {loop}")
            for loop in loops
            if loop
        ]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=min(len(handles), 6), handlelength=3.2
    )


def _write_rows(runs: Sequence[Run], charts: Sequence[Chart], path: Path) -> None:
    rows: list[list[Any]] = [["run", "metric", "loop", "step", "tokens", "value"]]
    for chart in charts:
        for run in runs:
            for loop in _lines(run, chart):
                at = [run.name, chart.metric, loop or ""]
                rows += [[*at, p.step, p.tokens, p.value] for p in _series(run, chart, loop)]
    write_csv(path, rows)
