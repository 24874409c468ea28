"""Who is named when nothing moves any more."""

from dataclasses import replace

from pltmoe.runtime.hang_report import Sighting, report

DATA = Sighting(41, "data of step 7", 30.0, "datasets.py:80 batches")
SUM = Sighting(42, "forward and backward of step 7", 30.0, "pipeline.py:9 run", waits=True)


def test_fewest_marks_are_behind_and_equal_ranks_share_a_line():
    assert report([SUM, SUM, DATA, SUM])[0].splitlines() == [
        "no progress: rank 2 behind the others",
        "  ranks 0-1, 3: forward and backward of step 7, at pipeline.py:9 run, waiting for other "
        "ranks",
        "  rank 2: data of step 7, at datasets.py:80 batches",
    ]


def test_silence_is_worse_than_being_behind():
    told, behind = report([SUM, replace(DATA, answers=False), DATA, None])
    assert behind == [1, 3]
    assert told.startswith("no progress: ranks 1, 3 did not answer: stopped, dead, cut off")
    assert "rank 1: last heard of in: data of step 7" in told and "rank 3: never heard of" in told


def test_at_the_same_mark_the_one_that_does_not_wait_is_named():
    busy = replace(SUM, waits=False, place="moe.py:5 sort")
    assert "all but rank 0 wait in torch.distributed" in report([busy, SUM, SUM])[0]
    assert "all ranks are at the same place, see their stacks" in report([SUM, SUM])[0]
    assert "all ranks are at the same place" in report([busy])[0]


def test_who_is_behind_is_also_a_list_of_ranks():
    assert report([SUM, SUM, DATA, SUM])[1] == [2]
    assert report([replace(SUM, waits=False), SUM, SUM])[1] == [0]
    assert report([SUM, SUM])[1] == report([DATA])[1] == []
