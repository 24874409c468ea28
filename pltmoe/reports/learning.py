"""Validation losses of ablation rows over seeds, and whether the paper's order of them shows."""

import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, nan
from pathlib import Path
from statistics import fmean

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from pltmoe.errors import DataError
from pltmoe.reports.markdown import table
from pltmoe.reports.numbers import scale_of
from pltmoe.reports.runs import Run, read_run
from pltmoe.reports.style import DETAIL_SHARE, STYLE, line_style, save, token_label

ALIKE = ((2, 3), (3, 5), (2, 5))
BETTER = ((2, 4), (3, 4), (5, 4), (4, 1), (6, 2), (6, 3), (6, 5))
"""The order of the paper's ablation (arXiv 2510.24824): rows 2, 3 and 5 about alike, better than
row 4, which is better than row 1; row 6 best. Pairs of rows; in ``BETTER`` the better one first."""
_FOLDER = re.compile(r"(?P<name>.+)-seed(?P<seed>\d+)")


@dataclass(frozen=True)
class Row:
    """What one model reached, by seed."""

    name: str
    runs: Mapping[int, Run]

    def only(self, seeds: Sequence[int]) -> "Row":
        """Return the row with some of its seeds."""
        return Row(self.name, {seed: self.runs[seed] for seed in seeds})

    @property
    def losses(self) -> list[float]:
        """Last validation loss of each seed, nats per token."""
        return [run.series("valid/loss")[-1].value for _, run in sorted(self.runs.items())]

    @property
    def mean(self) -> float:
        """Mean over the seeds; NaN without any."""
        return fmean(self.losses) if self.runs else nan

    @property
    def spread(self) -> float | None:
        """Highest minus lowest seed; None with one seed."""
        return max(self.losses) - min(self.losses) if len(self.runs) > 1 else None


def read_rows(folder: Path, names: Sequence[str]) -> list[Row]:
    """Read ``folder/NAME-seedN``, for each of ``names`` those that validated at their last step."""
    found: dict[str, dict[int, Run]] = {name: {} for name in names}
    for path in sorted(folder.glob("*-seed*")):
        match = _FOLDER.fullmatch(path.name)
        if match is None or match["name"] not in found:
            continue
        try:
            run = read_run(path)
        except DataError:  # began, and logged nothing
            continue
        valid = run.series("valid/loss")
        if valid and valid[-1].step == run.config.train.steps:
            found[match["name"]][int(match["seed"])] = run
    return [Row(name, runs) for name, runs in found.items() if runs]


def common_seeds(rows: Sequence[Row]) -> list[int]:
    """Return the seeds that all rows have: only over those do means compare models."""
    return sorted(set.intersection(*(set(row.runs) for row in rows)))


def losses_table(rows: Sequence[Row]) -> str:
    """Return rows side by side, in Markdown.

    Means are over the seeds that all rows have; where others are left out, the head says so.
    The spread is over all seeds of a row.
    """
    seeds = sorted({seed for row in rows for seed in row.runs})
    common = common_seeds(rows)
    over = "" if common == seeds else f" ({_named(common)})"
    head = ["model", *(f"seed {seed}" for seed in seeds)]
    lines = [[*head, f"mean{over}", "spread", f"to the best{over}"]]
    means = [row.only(common).mean for row in rows]
    best = min(filter(isfinite, means), default=nan)
    for row, mean in zip(rows, means, strict=True):
        by_seed = dict(zip(sorted(row.runs), row.losses, strict=True))
        each = [f"{by_seed[seed]:.4f}" if seed in by_seed else "-" for seed in seeds]
        spread = "-" if row.spread is None else f"{row.spread:.4f}"
        compared = [f"{mean:.4f}", spread, f"+{mean - best:.4f}"]
        lines.append([row.name, *each, *(compared if common else ["-", spread, "-"])])
    return table(lines)


def _named(seeds: Sequence[int]) -> str:
    plural = "s" * (len(seeds) > 1)
    return f"seed{plural} {', '.join(map(str, seeds))}" if seeds else "no seed in common"


def order(rows: Sequence[Row]) -> str:
    """Say which of the paper's inequalities show, by differences of means and seed spreads.

    ``rows`` are those named ``row1`` to ``row6``; others are ignored.
    """
    by_number = {int(row.name[3:]): row for row in rows if re.fullmatch(r"row\d", row.name)}
    pairs = [(a, b, True) for a, b in ALIKE] + [(a, b, False) for a, b in BETTER]
    lines, counts = [], {"shows": 0, "does not show": 0, "not told apart": 0, "not run": 0}
    for a, b, alike in pairs:
        verdict, why = _verdict(by_number.get(a), by_number.get(b), alike)
        counts[verdict] += 1
        claim = f"row {a} about as good as row {b}" if alike else f"row {a} better than row {b}"
        lines.append(f"- {claim}: **{verdict}** ({why})")
    whole = counts["shows"] == len(pairs)
    said = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
    return "\n".join(
        [
            f"**The paper's order {'shows' if whole else 'does not show as a whole'} at this "
            "scale** (rows 2, 3 and 5 about alike, better than 4, better than 1; 6 best). Of its "
            f"{len(pairs)} statements: {said}. Two rows differ where their means are further "
            "apart than the larger of their spreads, both over the seeds that the two have.",
            "",
            *lines,
        ]
    )


def _verdict(a: Row | None, b: Row | None, alike: bool) -> tuple[str, str]:
    if a is None or b is None:
        return "not run", "a row is missing"
    common = common_seeds([a, b])
    if not common:
        return "not told apart", "no seed in common"
    a, b = a.only(common), b.only(common)
    difference, spreads = a.mean - b.mean, (a.spread, b.spread)
    if any(spread is None for spread in spreads):
        return "not told apart", f"{difference:+.4f}, one seed has no spread"
    spread = max(s for s in spreads if s is not None)
    why = f"{difference:+.4f}, spread {spread:.4f}"
    if alike:
        return ("shows" if abs(difference) <= spread else "does not show"), why
    if abs(difference) <= spread:
        return "not told apart", why
    return ("shows" if difference < 0 else "does not show"), why


def draw(rows: Sequence[Row], path: Path, title: str) -> None:
    """Draw validation losses over tokens, whole and the end enlarged.

    Rows of the ablation come first; other models then have a panel beside rows 5 and 6.
    """
    six = [(i, row) for i, row in enumerate(rows) if re.fullmatch(r"row\d", row.name)]
    others = [pair for pair in enumerate(rows) if pair not in six]
    beside = [(i, row) for i, row in six if row.name in ("row5", "row6")]
    first, name = (six, "the ablation's rows") if six else (others, "the models")
    panels = [(name, first, 0.0), ("the end of it, enlarged", first, DETAIL_SHARE)]
    if six and others:
        known = " and ".join(row.name for _, row in beside)
        name = f"variants beside {known}" if beside else "variants"
        panels.append((name, [*beside, *others], DETAIL_SHARE))
    width = 4.8 * len(panels)
    longest = max(len(row.name) for row in rows)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, 4.8), layout="constrained")
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for axis, (name, drawn, share) in zip(axes, panels, strict=True):
            _panel(axis, drawn, share)
            seeds = common_seeds([row for _, row in drawn])
            whole = all(len(row.runs) == len(seeds) for _, row in drawn)
            axis.set_title(name if whole else f"{name} ({_named(seeds)})")
        axes[0].set_ylabel("validation loss (nats per token)")
        handles = [Line2D([], [], **line_style(i), label=row.name) for i, row in enumerate(rows)]
        figure.legend(
            handles=handles,
            title="line: mean over seeds, band: from the lowest to the highest",
            loc="outside lower center",
            ncols=min(5, max(1, int(width / (0.9 + 0.08 * longest)))),  # inches of an entry
            handlelength=3.4,
        )
        title = textwrap.fill(title, int(8.5 * width))
        figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
        save(figure, path)


def _panel(axis: Axes, rows: Sequence[tuple[int, Row]], end_share: float) -> None:
    """Draw rows over the seeds that all have; without such a seed, each over its own."""
    if common := common_seeds([row for _, row in rows]):
        rows = [(index, row.only(common)) for index, row in rows]
    most = max(run.tokens for _, row in rows for run in row.runs.values())
    divisor, prefix = scale_of(most)
    shown: list[float] = []
    for index, row in rows:
        series = [{p.tokens: p.value for p in r.series("valid/loss")} for r in row.runs.values()]
        at = sorted(set.intersection(*map(set, series)))  # where all seeds were validated
        tokens = np.array(at) / divisor
        losses = np.array([[values[t] for t in at] for values in series])
        style = line_style(index)
        axis.plot(tokens, losses.mean(0), **style)
        axis.fill_between(
            tokens, losses.min(0), losses.max(0), color=style["color"], alpha=0.15, linewidth=0
        )
        shown += losses[:, tokens >= (1 - end_share) * most / divisor].flatten().tolist()
    axis.set_xlabel(token_label(prefix))
    if not end_share:
        axis.set_xlim(left=0)
        return
    axis.set_xlim((1 - end_share) * most / divisor, (1 + 0.04 * end_share) * most / divisor)
    shown = [loss for loss in shown if isfinite(loss)] or [0.0]
    room = 0.08 * (max(shown) - min(shown)) or 0.01
    axis.set_ylim(min(shown) - room, max(shown) + room)
