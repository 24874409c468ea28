"""Rows over seeds: what is said about the paper's order follows from the numbers alone."""

import math
from pathlib import Path

import pytest
from matplotlib.axes import Axes
from matplotlib.image import imread

from pltmoe.reports import learning
from pltmoe.reports.learning import losses_table, order, read_rows
from pltmoe.reports.style import save
from tests.unit.reports.logged_runs import logged_rows

PAPER = {"row1": 3.30, "row2": 3.11, "row3": 3.112, "row4": 3.20, "row5": 3.108, "row6": 3.00}


def test_the_papers_order_shows_where_it_is(tmp_path: Path) -> None:
    rows = read_rows(logged_rows(tmp_path, PAPER), list(PAPER))
    said = order(rows)
    assert said.startswith("**The paper's order shows at this scale**")
    assert "Of its 10 statements: 10 shows." in said
    assert "- row 4 better than row 1: **shows** (-0.1000, spread 0.0100)" in said
    assert "- row 2 about as good as row 3: **shows** (-0.0020, spread 0.0100)" in said


def test_reversed_rows_and_rows_within_the_spread_are_named(tmp_path: Path) -> None:
    losses = PAPER | {"row1": 2.90, "row4": 3.115}
    said = order(read_rows(logged_rows(tmp_path, losses), list(losses)))
    assert said.startswith("**The paper's order does not show as a whole at this scale**")
    assert "- row 4 better than row 1: **does not show** (+0.2150, spread 0.0100)" in said
    assert "- row 5 better than row 4: **not told apart** (-0.0070, spread 0.0100)" in said


def test_one_seed_tells_nothing_apart_and_missing_rows_are_not_run(tmp_path: Path) -> None:
    rows = read_rows(logged_rows(tmp_path, {"row1": 3.0, "row4": 2.0}, seeds=(1,)), list(PAPER))
    said = order(rows)
    assert "- row 4 better than row 1: **not told apart** (-1.0000, one seed has no spread)" in said
    assert "Of its 10 statements: 1 not told apart, 9 not run." in said


def test_only_runs_that_reached_their_end_count(tmp_path: Path) -> None:
    logged_rows(tmp_path, {"row1": 3.0, "row2": 3.1})
    (tmp_path / "row3-seed1").mkdir()
    unfinished = tmp_path / "row2-seed2/metrics.jsonl"
    unfinished.write_text("".join(unfinished.read_text().splitlines(keepends=True)[:5]))
    rows = read_rows(tmp_path, list(PAPER))
    assert [(row.name, sorted(row.runs)) for row in rows] == [("row1", [1, 2]), ("row2", [1])]
    lines = [line.split("|")[1:-1] for line in losses_table(rows).splitlines()]
    assert [cell.strip() for cell in lines[0]] == [
        "model", "seed 1", "seed 2", "mean (seed 1)", "spread", "to the best (seed 1)",
    ]  # fmt: skip
    assert [cell.strip() for cell in lines[2]] == [
        "row1", "2.9950", "3.0050", "2.9950", "0.0100", "+0.0000",
    ]  # fmt: skip
    assert [cell.strip() for cell in lines[3]] == ["row2", "3.0950", "-", "3.0950", "-", "+0.1000"]


def test_models_are_compared_over_the_seeds_that_they_share(tmp_path: Path, monkeypatch) -> None:
    """Seed 2 is the worse one by 0.01: a model without it would look better than it is."""
    logged_rows(tmp_path, {"row5": 3.0, "row6": 3.0, "plt3": 3.004}, seeds=(1,))
    logged_rows(tmp_path, {"row5": 3.0, "row6": 2.95}, seeds=(2,))
    rows = read_rows(tmp_path, ["row5", "row6", "plt3"])
    lines = [line.split("|")[1:-1] for line in losses_table(rows).splitlines()]
    assert [[cell.strip() for cell in line[3:]] for line in lines if "---" not in line[0]] == [
        ["mean (seed 1)", "spread", "to the best (seed 1)"],
        ["2.9950", "0.0100", "+0.0000"],
        ["2.9950", "0.0400", "+0.0000"],
        ["2.9990", "-", "+0.0040"],
    ]
    said = "- row 6 better than row 5: **not told apart** (-0.0250, spread 0.0400)"
    assert said in order(rows), "the pair has both seeds"
    half = [rows[0], rows[1].only([1])]
    said = "- row 6 better than row 5: **not told apart** (+0.0000, one seed has no spread)"
    assert said in order(half)
    apart = [rows[0].only([1]), rows[1].only([2])]
    assert "(no seed in common)" in order(apart)
    assert "| mean (no seed in common) |" in losses_table(apart)

    drawn, plot = [], Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda s, *a, **k: drawn.append(a) or plot(s, *a, **k))
    figures = []
    monkeypatch.setattr(learning, "save", lambda figure, path: figures.append(figure))
    rows[2].runs[1].lines[-1]["valid/loss"] = math.inf
    learning.draw(rows, tmp_path / "learning.png", "t")
    last = [losses[-1] for _, losses in drawn]  # two panels of two rows, one of three
    assert last == pytest.approx([3.0, 2.975, 3.0, 2.975, 2.995, 2.995, math.inf])
    del rows[1].runs[2].lines[0]  # this seed was not validated there
    learning.draw(rows[:2], tmp_path / "learning.png", "t")
    assert drawn[-1][0] == pytest.approx(drawn[0][0][1:]) and len(drawn[-1][1]) == 9
    assert drawn[-1][1] == pytest.approx(drawn[1][1][1:])
    titles = [axis.get_title("left") for axis in figures[0].axes]
    assert titles[1:] == [
        "the end of it, enlarged",
        "variants beside row5 and row6 (seed 1)",
    ]


@pytest.mark.parametrize(
    ("names", "panels"),
    [
        ([*PAPER, "plt2-normed", "plt2-shared", "plt3"], 3),
        (["vanilla", "loop2", "plt2"], 2),
        (["row1"], 2),
        ([f"a-model-with-a-very-long-name-{number}" for number in range(4)], 2),
    ],
)
def test_the_picture_is_whole_whatever_it_is_drawn_from(names, panels, tmp_path, monkeypatch):
    losses = {name: PAPER.get(name, 3.05) for name in names}
    figures = []
    monkeypatch.setattr(learning, "save", lambda f, path: figures.append(f) or save(f, path))
    title = "a title that is longer than one panel " * 3
    learning.draw(read_rows(logged_rows(tmp_path, losses), names), tmp_path / "learning.png", title)
    picture = imread(tmp_path / "learning.png")
    assert picture.shape[1] > 1000 and picture[..., :3].min() < 0.5
    (figure,) = figures
    figure.draw_without_rendering()  # at the figure's own resolution, not the file's
    assert len(figure.axes) == panels
    assert figure.axes[0].get_xlim()[0] == 0 and figure.axes[1].get_xlim()[0] > 60
    (legend,) = figure.legends
    for part in (figure._suptitle, legend, *(axis.title for axis in figure.axes)):
        box = part.get_window_extent()
        assert box.x0 >= 0 and box.y0 >= 0
        assert box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
