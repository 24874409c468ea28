"""Pictures of a pipeline's schedule: what every stage does when, ours above the naive way."""

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from pltmoe.parallel.schedule import (
    Timed,
    bubble_fraction,
    build_schedule,
    measured_bubble,
    naive_schedule,
    simulate,
    step_time,
)

matplotlib.use("Agg")

_COLOURS = ("#2f6db3", "#d9822b", "#3c9a6b", "#9b59b6", "#c0392b", "#7f8c8d")
Played = list[list[Timed]]


def draw_timeline(stages: int, loops: int, chunks: int, micro_batches: int, path: Path) -> Path:
    """Draw the schedule as a PNG; forward takes 1 and backward 2 units of time.

    Rows are stages, colours loops, light boxes forward and dark ones backward, numbers micro
    batches. Below, on the same axis of time, L pipelines one after another.
    """
    ours, naive = _both(stages, loops, chunks, micro_batches)
    figure = Figure(figsize=(13, 1.6 + 0.42 * stages * 2 + 1.2), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    end = max(step_time(ours), step_time(naive))
    _draw(above, ours, loops, end)
    _draw(below, naive, loops, end)
    formula = bubble_fraction(stages, loops, chunks, micro_batches)
    above.set_title(
        f"loops interleaved: {step_time(ours):g} units, stages wait {measured_bubble(ours):.1%}"
        f"   (P-1)/(vLM+P-1) = {formula:.1%}",
        loc="left",
    )
    below.set_title(
        f"one pipeline per loop: {step_time(naive):g} units, stages wait "
        f"{measured_bubble(naive):.1%}",
        loc="left",
    )
    below.set_xlabel("time, in forward passes of one loop chunk")
    figure.suptitle(
        f"P = {stages} stages, L = {loops} loops, v = {chunks} model chunk(s), "
        f"M = {micro_batches} micro batches",
        fontsize=13,
        fontweight="bold",
    )
    handles = [Patch(color=_shade(loop, "F"), label=f"loop {loop + 1} F") for loop in range(loops)]
    handles += [Patch(color=_shade(loop, "B"), label=f"loop {loop + 1} B") for loop in range(loops)]
    figure.legend(handles=handles, loc="outside lower center", ncols=2 * loops, frameon=False)
    part = path.with_name(path.name + ".part")
    figure.savefig(part, dpi=130, format="png")
    part.replace(path)
    return path


def timeline_text(stages: int, loops: int, chunks: int, micro_batches: int, width: int) -> str:
    """Return the schedule as text of ``width`` columns: loop numbers, F as 1 2 3, B as a b c."""
    ours, naive = _both(stages, loops, chunks, micro_batches)
    end = max(step_time(ours), step_time(naive))
    lines = [f"interleaved loops: stages wait {measured_bubble(ours):.1%}"]
    lines += _rows(ours, end, width)
    lines += [f"one pipeline per loop: stages wait {measured_bubble(naive):.1%}"]
    lines += _rows(naive, end, width)
    return "\n".join([*lines, "forward of loop 1 2 3, backward a b c, . waiting"])


def _both(stages: int, loops: int, chunks: int, micro_batches: int) -> tuple[Played, Played]:
    """Play our schedule and the naive one; a chunk takes 1/v of a stage's time in both."""
    ours = simulate(build_schedule(stages, loops, chunks, micro_batches))
    naive = simulate(
        naive_schedule(stages, loops, 1, micro_batches),
        lambda _, op: chunks * (1.0 if op.kind == "F" else 2.0),
        naive=True,
    )
    return ours, naive


def _draw(axes: Axes, played: Played, loops: int, end: float) -> None:
    for stage, row in enumerate(played):
        for timed in row:
            op, length = timed.operation, timed.end - timed.start
            colour = _shade(op.loop - 1, op.kind)
            axes.add_patch(
                Rectangle(
                    (timed.start, stage - 0.4), length, 0.8, facecolor=colour, edgecolor="white"
                )
            )
            if end / length < 130:  # wide enough for a number
                axes.text(
                    timed.start + length / 2,
                    stage,
                    str(op.micro_batch),
                    ha="center",
                    va="center",
                    fontsize=7,
                    color="white" if op.kind == "B" else "black",
                )
    axes.set_xlim(0, end)
    axes.set_ylim(len(played) - 0.4, -0.6)
    axes.set_yticks(range(len(played)), [f"stage {stage}" for stage in range(len(played))])
    axes.set_facecolor("#f1f1f1")
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0)


def _shade(loop: int, kind: str) -> tuple[float, float, float]:
    base = to_rgb(_COLOURS[loop % len(_COLOURS)])
    if kind == "B":
        return base
    r, g, b = (0.45 * part + 0.55 for part in base)
    return (r, g, b)


def _rows(played: Played, end: float, width: int) -> list[str]:
    label = len(f"stage {len(played) - 1} ")
    columns = max(1, width - label)
    rows = []
    for stage, row in enumerate(played):
        cells = ["."] * columns
        for timed in row:
            sign = "123456789" if timed.operation.kind == "F" else "abcdefghi"
            first, last = (round(t / end * columns) for t in (timed.start, timed.end))
            cells[first:last] = sign[(timed.operation.loop - 1) % 9] * (last - first)
        rows.append(f"stage {stage} ".ljust(label) + "".join(cells))
    return rows
