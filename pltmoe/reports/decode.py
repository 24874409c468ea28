"""Decode benchmarks as one picture: time per token over batch size, and its ratio to vanilla."""

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pltmoe.reports.style import STYLE, line_style, save


def plot_decode(tree: dict[str, Any], path: Path) -> None:
    """Draw the records of tools/benchmark_decode.py, one row of two panels for each group.

    Ratios are to the first vanilla model of a group, or its first model.
    """
    groups = list(dict.fromkeys(r["group"] for r in _measured(tree)))
    if not groups:
        return
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 4.2 * len(groups)), layout="constrained")
        axes = figure.subplots(len(groups), 2, squeeze=False)
        for (left, right), group in zip(axes, groups, strict=True):
            _panels(left, right, group, [r for r in _measured(tree) if r["group"] == group])
        where = tree["where"]
        title = f"{where['device']}, {where['dtype']}: {where['scale']}"
        figure.suptitle(title, x=0.01, ha="left", fontsize=13)
        save(figure, path)


def _measured(tree: dict[str, Any]) -> list[dict[str, Any]]:
    return [r for r in tree["decode"] if "ms_per_token" in r]


def _panels(left: Axes, right: Axes, group: str, records: list[dict[str, Any]]) -> None:
    times: dict[str, dict[int, float]] = {}
    for r in records:
        times.setdefault(r["model"], {})[r["batch"]] = r["ms_per_token"]
    base = next((m for m in times if m.startswith("vanilla")), next(iter(times)))
    for index, (model, at) in enumerate(times.items()):
        style = line_style(index)
        left.plot(list(at), list(at.values()), label=model, **style)
        both = [batch for batch in at if batch in times[base]]
        right.plot(both, [at[b] / times[base][b] for b in both], **style)
    for axis in (left, right):
        axis.set_xscale("log", base=2)
        axis.set_xticks(batches := sorted({r["batch"] for r in records}), map(str, batches))
        axis.minorticks_off()
        axis.set_xlabel("batch (sequences)")
    left.set_yscale("log")
    left.set_ylabel("ms per token")
    left.set_title(f"{group}: time of a decode step")
    right.set_ylabel(f"time / {base}")
    right.set_ylim(bottom=0)
    right.set_title(f"{group}: ratio to {base}")
    left.legend(fontsize=8)
