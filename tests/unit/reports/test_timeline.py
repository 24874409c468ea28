"""Pictures of the pipeline: everything is drawn, and the text has the width that was asked for."""

import io

import pytest
from matplotlib.figure import Figure

from pltmoe.reports import timeline
from pltmoe.reports.timeline import draw_timeline, timeline_text


@pytest.mark.parametrize("shape", [(4, 2, 1, 8), (2, 3, 2, 4), (2, 1, 1, 2)])
def test_picture_is_written_whole(shape, tmp_path):
    path = draw_timeline(*shape, tmp_path / "timeline.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in tmp_path.iterdir()] == ["timeline.png"]


def test_the_legend_of_many_loops_and_chunks_is_as_wide_as_the_picture():
    figure = Figure(figsize=(timeline._WIDTH_INCHES, 6), layout="constrained")
    timeline._legend(figure, loops=3, chunks=4)
    figure.savefig(io.BytesIO())
    assert figure.legends[0].get_window_extent().x1 < figure.bbox.x1


def test_text_shows_each_loop_and_the_waiting():
    lines = timeline_text(2, 2, 1, 2, 40).splitlines()
    assert lines[0] == "interleaved loops: stages wait 20.0%"
    assert lines[3] == "one pipeline per loop: stages wait 33.3%"
    rows = [line for line in lines if line.startswith("stage")]
    assert all(len(row) == 40 for row in rows)
    assert all(set("12ab.") <= set(row[8:]) for row in rows)
    assert rows[0][8] == "1" and rows[1][8] == "."  # stage 1 waits for the first micro batch


def test_naive_way_fills_and_drains_once_per_loop_with_model_chunks_too():
    """It had been drawn without model chunks, so that it seemed to wait v times too long."""
    lines = timeline_text(2, 3, 2, 4, 90).splitlines()
    assert lines[0] == "interleaved loops: stages wait 4.0%"  # 1 / 25
    assert lines[3] == "one pipeline per loop: stages wait 11.1%"  # 1 / 9
    ours, naive = lines[1][8:], lines[4][8:].rstrip()
    assert naive.startswith("11111111.22222222.33333333...cccc")
    assert len(ours.rstrip()) == 75  # nothing is drawn after the step: that is not waiting
    assert ours.count("1") == 8 and ours.count("a") == 16


@pytest.mark.parametrize("shape", [(1, 2, 1, 3), (4, 1, 1, 8), (4, 1, 2, 8)])
def test_where_nothing_can_be_won_one_way_is_shown(shape):
    text = timeline_text(*shape, 200)
    assert "interleaved loops" in text and "one pipeline per loop" not in text
