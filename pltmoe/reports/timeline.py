"""The pipeline's order of work as a picture: what each stage does when, and where it waits.

Two ways on one time axis: loops interleaved, as they run, and one pipeline per loop, each filled
and drained before the next. Forward passes take 1, backward passes 2.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from pltmoe.parallel.schedule import (
    Operation,
    Timed,
    bubble_fraction,
    build_schedule,
    measured_bubble,
    naive_bubble_fraction,
    naive_schedule,
    simulate,
    step_time,
)
from pltmoe.reports.style import COLOURS, INK, save

_WAITING = "#eeeeee"
_WIDTH_INCHES = 14.0
_MARGIN_INCHES = 1.2
_ROW_INCHES = 0.42
_FONT_POINTS = 8.0
_LETTERS, _IDLE = ("1a", "2b", "3c", "4d", "5e", "6f", "7g", "8h", "9i"), "."
"""Terminal: each loop forward and backward; waiting."""


@dataclass(frozen=True)
class Panel:
    """One way to run a step, played."""

    name: str
    played: Sequence[list[Timed]]
    """What each stage does when, in forward passes of one loop chunk."""
    bubble: float
    """Share of the stages' time in which they wait."""
    time: float
    formula: str
    """What the bubble is in theory, when micro batches come in whole groups of stages."""

    @property
    def title(self) -> str:
        """What it is and what it costs."""
        return f"{self.name}: stages wait {self.bubble:.1%}"


def draw_timeline(stages: int, loops: int, chunks: int, micro_batches: int, path: Path) -> Path:
    """Draw one step of a pipeline, loops interleaved above and one pipeline per loop below.

    A row is a stage, a colour a loop (a shade a model chunk), light forward and dark backward; the
    number in a box is its micro batch, where there is room. Returns ``path``, a PNG.
    """
    both = _panels(stages, loops, chunks, micro_batches)
    style = {"font.size": 10, "savefig.dpi": 160, "text.color": INK}
    with matplotlib.rc_context(style):
        height = 1.6 + len(both) * (0.55 + _ROW_INCHES * stages)
        figure = Figure(figsize=(_WIDTH_INCHES, height), layout="constrained")
        end = max(panel.time for panel in both)
        axes = figure.subplots(len(both), 1, sharex=True, squeeze=False)[:, 0]
        for axis, panel in zip(axes, both, strict=True):
            _draw(axis, panel, end, chunks)
        axes[-1].set_xlabel("time, in forward passes of one loop chunk (backward: 2)")
        _legend(figure, loops, chunks)
        figure.suptitle(
            _headline(stages, loops, chunks, micro_batches),
            x=0.01,
            ha="left",
            fontsize=13,
            fontweight="bold",
        )
        save(figure, path)
    return path


def timeline_text(stages: int, loops: int, chunks: int, micro_batches: int, width: int) -> str:
    """Return the same for a terminal: rows of ``width`` columns, digits forward, letters backward.

    A column shows what is under its middle; all rows have one time scale.
    """
    both = _panels(stages, loops, chunks, micro_batches)
    label = len(f"stage {stages - 1} ")
    columns = max(1, width - label)
    end = max(panel.time for panel in both)
    # Whole columns for a unit of time, if there are enough: boxes of one length look the same.
    per_unit = columns // end if end <= columns else columns / end
    lines = []
    for panel in both:
        lines.append(panel.title)
        for stage, row in enumerate(panel.played):
            drawn = _cells(row, round(panel.time * per_unit), per_unit)
            lines.append(f"stage {stage} ".ljust(label) + drawn.ljust(columns))
    names = [f"{f} {b} loop {n}" for n, (f, b) in enumerate(_LETTERS[:loops], start=1)]
    return "\n".join([*lines, f"forward, backward: {', '.join(names)}; {_IDLE} waiting"])


def _panels(stages: int, loops: int, chunks: int, micro_batches: int) -> list[Panel]:
    """Play both ways; only one where there is no other stage to wait for, or no other loop."""
    shape = (stages, loops, chunks, micro_batches)
    played = simulate(build_schedule(*shape))
    formula = f"(P-1)/(vLM+P-1) = {bubble_fraction(*shape):.1%}"
    panels = [
        Panel("interleaved loops", played, measured_bubble(played), step_time(played), formula)
    ]
    if stages > 1 and loops > 1:
        played = simulate(naive_schedule(*shape), naive=True)
        formula = f"(P-1)/(vM+P-1) = {naive_bubble_fraction(stages, chunks, micro_batches):.1%}"
        name = "one pipeline per loop"
        panels.append(Panel(name, played, measured_bubble(played), step_time(played), formula))
    return panels


def _headline(stages: int, loops: int, chunks: int, micro_batches: int) -> str:
    counts = {"stage": stages, "loop": loops, "model chunk": chunks, "micro batch": micro_batches}
    shown = {name: n for name, n in counts.items() if name != "model chunk" or n > 1}
    ends = {"micro batch": "es"}
    words = [f"{n} {name}{ends.get(name, 's') * (n != 1)}" for name, n in shown.items()]
    return "One step of " + ", ".join(words)


def _draw(axis: Axes, panel: Panel, end: float, chunks: int) -> None:
    title = f"{panel.title} of {panel.time:g} units     {panel.formula}"
    axis.set_title(title, loc="left", fontsize=11)
    points = (_WIDTH_INCHES - _MARGIN_INCHES) * 72 / end
    for stage, row in enumerate(panel.played):
        axis.broken_barh([(0, panel.time)], (stage - 0.42, 0.84), color=_WAITING, zorder=1)
        boxes: dict[tuple[str, int, int], list[tuple[float, float]]] = {}
        for timed in row:
            op = timed.operation
            span = (timed.start, timed.end - timed.start)
            boxes.setdefault((op.kind, op.loop, op.chunk), []).append(span)
            _number(axis, timed, stage, points)
        for (kind, loop, chunk), spans in boxes.items():
            axis.broken_barh(
                spans,
                (stage - 0.42, 0.84),
                facecolor=_colour(kind, loop, chunk, chunks),
                edgecolor="white",
                linewidth=min(0.8, points / 12),
                zorder=2,
            )
    axis.set_xlim(0, end)
    axis.set_ylim(len(panel.played) - 0.5, -0.5)
    axis.set_yticks(range(len(panel.played)), [f"stage {n}" for n in range(len(panel.played))])
    axis.tick_params(length=0)
    for side in ("top", "right", "left", "bottom"):
        axis.spines[side].set_visible(False)


def _number(axis: Axes, timed: Timed, stage: int, points: float) -> None:
    """Write the micro batch into its box, if it fits; ``points`` per unit of time."""
    op, text = timed.operation, str(timed.operation.micro_batch)
    room = (timed.end - timed.start) * points
    if room < len(text) * 0.65 * _FONT_POINTS + 2:
        return
    axis.text(
        (timed.start + timed.end) / 2,
        stage,
        text,
        ha="center",
        va="center",
        fontsize=_FONT_POINTS,
        color=INK if op.kind == "F" else "white",
        zorder=3,
    )


def _colour(kind: str, loop: int, chunk: int, chunks: int) -> tuple[float, ...]:
    """Return a loop's colour: backward dark, forward light; later model chunks darker."""
    base = to_rgb(COLOURS[(loop - 1) % len(COLOURS)])
    depth = chunk / max(chunks, 1)
    if kind == "F":  # towards white
        white = 0.72 - 0.35 * depth
        return tuple(c + (1 - c) * white for c in base)
    return tuple(c * (0.95 - 0.45 * depth) for c in base)


def _legend(figure: Figure, loops: int, chunks: int) -> None:
    handles = []
    for loop in range(1, loops + 1):
        for chunk in range(chunks):
            of = f" chunk {chunk}" if chunks > 1 else ""
            for kind, name in (("F", "forward"), ("B", "backward")):
                colour = _colour(kind, loop, chunk, chunks)
                handles.append(Patch(facecolor=colour, label=f"loop {loop}{of} {name}"))
    handles.append(Patch(facecolor=_WAITING, label="waits"))
    columns = min(len(handles), 6)
    figure.legend(
        handles=handles, loc="outside lower left", ncols=columns, frameon=False, fontsize=9
    )


def _cells(row: list[Timed], cells: int, per_unit: float) -> str:
    """Return one character per column: the operation under its middle."""
    drawn = [_IDLE] * cells
    place = 0
    for column in range(cells):
        middle = (column + 0.5) / per_unit
        while place < len(row) and row[place].end <= middle:
            place += 1
        if place < len(row) and row[place].start <= middle:
            drawn[column] = _letter(row[place].operation)
    return "".join(drawn)


def _letter(op: Operation) -> str:
    return _LETTERS[(op.loop - 1) % len(_LETTERS)]["FB".index(op.kind)]
