"""How all pictures look, and how they and their CSVs are written.

Colours are Okabe and Ito's, which people with any colour vision tell apart; lines and markers
differ in shape as well.
"""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from pltmoe.errors import DataError

COLOURS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C8C8C",
)  # fmt: skip
"""As many as the decode benchmark has models of one size."""
LINES = ("-", (0, (5, 1.5)), (0, (1.5, 1)), (0, (5, 1.5, 1, 1.5)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p", "*")
"""One more than colours: with them and the lines, 72 runs look different."""
INK, GRID = "#222222", "#dddddd"
DETAIL_SHARE = 0.35
"""Share of the training, at its end, that is shown enlarged."""
STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": "#888888",
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "savefig.dpi": 160,
    "figure.facecolor": "white",
}


def line_style(index: int) -> dict[str, Any]:
    """Line and marker of the run at ``index``."""
    colour = COLOURS[index % len(COLOURS)]
    return {
        "color": colour,
        "linestyle": LINES[index % len(LINES)],
        "marker": MARKERS[index % len(MARKERS)],
        "markersize": 6,
        "markerfacecolor": "white",
        "markeredgecolor": colour,
        "markeredgewidth": 1.5,
    }


def token_label(prefix: str) -> str:
    """Name the axis of tokens in units of ``prefix`` (numbers.scale_of)."""
    words = {"k": "thousand ", "M": "million ", "G": "billion ", "T": "trillion "}
    return f"training tokens ({words[prefix].strip()})" if prefix else "training tokens"


def write_csv(path: Path, rows: Sequence[Sequence[Any]]) -> None:
    """Write rows, floats with all their digits, through a temporary name."""
    new = path.with_name(path.name + ".new")
    with new.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
    new.replace(path)


def save(figure: Figure, path: Path) -> None:
    """Write the picture through a temporary name; a Figure of its own needs no display.

    Raises:
        DataError: it cannot be written there.
    """
    new = path.with_name(path.name + ".new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(new, format="png")
        new.replace(path)
    except OSError as error:
        raise DataError(f"{path}: the picture cannot be written ({error.strerror})") from None
