"""kill -9 at random moments, also in the middle of a save: nothing is lost, nothing is double."""

import pytest

from tests.launch import run_distributed

pytestmark = [pytest.mark.distributed, pytest.mark.xdist_group(__name__)]


def test_killed_runs_end_as_the_one_that_was_not(config, tmp_path) -> None:
    """Four kills, at least one of them while a checkpoint was being written in the background."""
    found = run_distributed(
        1,
        "tests.distributed.kill_cases:soak",
        config=config,
        folder=tmp_path,
        kills=4,
        seed=1,
    )[0]
    struck = {moment: count for moment, count in found.items() if moment != "finished"}
    assert sum(struck.values()) == 4, found
    assert struck.get("while a checkpoint was being written", 0) >= 1, found
