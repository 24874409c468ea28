"""Pictures of the pipeline: everything is drawn, and the text has the width that was asked for."""

import pytest

from pltmoe.reports.timeline import draw_timeline, timeline_text


@pytest.mark.parametrize("shape", [(4, 2, 1, 8), (2, 3, 2, 4), (2, 1, 1, 2)])
def test_picture_is_written_whole(shape, tmp_path):
    path = draw_timeline(*shape, tmp_path / "timeline.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in tmp_path.iterdir()] == ["timeline.png"]


def test_text_shows_each_loop_and_the_waiting():
    lines = timeline_text(2, 2, 1, 2, 40).splitlines()
    assert lines[0] == "interleaved loops: stages wait 20.0%"
    assert lines[3] == "one pipeline per loop: stages wait 33.3%"
    rows = [line for line in lines if line.startswith("stage")]
    assert all(len(row) == 40 for row in rows)
    assert all(set("12ab.") <= set(row[8:]) for row in rows)
    assert rows[0][8] == "1" and rows[1][8] == "."  # stage 1 waits for the first micro batch
