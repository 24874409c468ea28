"""Real ranks that hang: within seconds every live rank writes its stacks, the culprit is named."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from pltmoe.checkpoint import folders
from pltmoe.runtime.heartbeat import HANG_EXIT_CODE, RANKS_BEHIND
from tests.distributed.run_files import finish, start_python, start_ranks, wait_for
from tests.ports import free_port

pytestmark = [pytest.mark.distributed, pytest.mark.xdist_group(__name__)]
KINDS = ("slack", "lock", "stop_0")


def start(kind: str, folder: Path) -> list[subprocess.Popen[str]]:
    """Start two ranks; their store is ours, but for ``stop_0``, where it is rank 0's."""
    command = ["-m", "tests.distributed.hang_cases", kind, str(folder)]
    return start_python(command, 2, port=free_port() if kind == "stop_0" else None)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory) -> dict[str, Any]:
    """All ways to hang at the same time: kind -> (exit codes, outputs, folder of the stacks)."""
    folders = {kind: tmp_path_factory.mktemp(kind) / "logs" for kind in KINDS}
    running = {kind: start(kind, folder) for kind, folder in folders.items()}
    try:
        return {kind: (*_end_of(kind, ranks), folders[kind]) for kind, ranks in running.items()}
    finally:
        for rank in (rank for ranks in running.values() for rank in ranks):
            rank.kill()


def _end_of(kind: str, ranks: list[Any]) -> tuple[list[int], list[str]]:
    if kind == "stop_0":
        ranks[1].wait(timeout=200)
        ranks[0].kill()
    return finish(ranks, timeout_s=200)


def test_all_ranks_write_stacks_and_name_the_one_behind(jobs):
    """The sleeper may take three times as long, so it hears of it from the rank that waits."""
    codes, outputs, folder = jobs["slack"]
    assert codes == [HANG_EXIT_CODE] * 2, outputs
    for rank, output in enumerate(outputs):
        stacks = (folder / f"stacks_rank_{rank}.txt").read_text()
        for text in (output, stacks):
            assert "no progress: rank 1 behind the others" in text
            assert re.search(r"rank 1: data of step 3, at hang_cases\.py:\d+ hang\n", text)
            assert re.search(
                r"rank 0: sum of step 3, at hang_cases\.py:\d+ main, waiting for", text
            )
            assert "Thread 0x" in text and "hang_cases.py" in text
    assert (folder / RANKS_BEHIND).read_text() == "1\n"
    assert "in hang" in (folder / "stacks_rank_1.txt").read_text()
    assert "in all_reduce" in (folder / "stacks_rank_0.txt").read_text()
    assert "no progress for " in outputs[0].splitlines()[0]
    assert "another rank makes no progress; " in outputs[1].splitlines()[0]


def test_a_rank_stuck_with_pythons_lock_is_ended_by_the_c_thread(jobs):
    codes, outputs, folder = jobs["lock"]
    assert (folder / RANKS_BEHIND).read_text() == "1\n"
    assert codes == [HANG_EXIT_CODE, 1], outputs
    assert "no progress: rank 1 did not answer: stopped, dead, cut off, or inside C" in outputs[0]
    assert "rank 1: last heard of in: " in outputs[0]
    assert "Timeout (0:00:" in outputs[1] and "in hang" in outputs[1]


def test_rank_zero_may_stop_with_the_store(jobs):
    codes, outputs, folder = jobs["stop_0"]
    assert (folder / RANKS_BEHIND).read_text() == "0\n"
    assert codes == [-9, HANG_EXIT_CODE], outputs
    assert "the store at which the ranks met does not answer" in outputs[1]
    assert "in all_reduce" in outputs[1]


def test_a_real_run_ends_when_a_rank_is_stopped(config, tmp_path):
    """SIGSTOP to one rank of two of tools/pretrain.py: the other ends the job."""
    arguments = ["train.steps=500", "optimizer.decay_steps=500", "checkpoint.save_interval=2"]
    arguments += [f"train.output_dir={tmp_path}/run", "train.hang_timeout_minutes=0.3"]
    ranks = start_ranks(config, *arguments, nprocs=2)
    seen = wait_for(ranks[0], "step 5/500")
    os.kill(ranks[1].pid, signal.SIGSTOP)
    begin = time.monotonic()
    assert ranks[0].wait(timeout=200) == HANG_EXIT_CODE, seen
    assert time.monotonic() - begin < 180
    ranks[1].kill()
    _, outputs = finish(ranks)
    assert "no progress: rank 1 did not answer" in outputs[0]
    stacks = (tmp_path / "run" / "logs" / "stacks_rank_0.txt").read_text()
    assert "pltmoe/train/trainer.py" in stacks, "a step, a save or the vote on stopping"
    assert not list((tmp_path / "run" / "logs").glob("stacks_rank_1*"))
    assert folders.latest_checkpoint(tmp_path / "run") is not None, "where the run would go on"
