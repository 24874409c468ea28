"""Runs killed at random moments, forked from one process that has imported everything.

    python -m tests.distributed.kill_cases FOLDER --kills 20 --processes 1 --seed 0

prints where the kills struck; ``test_kill.py`` makes a few of them. A fork costs nothing, where
starting the tool anew costs eight seconds of imports. The parent starts no process group and no
threads of its own, so that the children are what the command line would start.
"""

import argparse
import ctypes
import json
import os
import random
import re
import signal
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

import torch

from pltmoe.checkpoint import folders
from pltmoe.checkpoint.integrity import check_files
from pltmoe.checkpoint.manifest import read_manifest
from tests.distributed.run_files import curve_of, make_files
from tests.state_dicts import tensors_of

STEPS = 10
_MORE = (f"train.steps={STEPS}", "checkpoint.save_interval=1", "train.eval_interval=5")
_AFTER_A_SAVE_BEGAN_S = 0.05


def soak(config: Path, folder: Path, kills: int, seed: int, processes: int = 1) -> dict[str, int]:
    """Kill runs until ``kills`` have been, resume each to its end, and compare; count the moments.

    Every other kill waits until a save has begun. The rest strike at any time of a run.
    """
    import pltmoe.train.pretrain  # noqa: F401  before the forks

    moments = random.Random(seed)
    began = time.monotonic()
    straight = _Run(config, folder / "straight", processes)
    straight.start()
    assert straight.wait() == [0] * processes, straight.log()
    duration, expected = time.monotonic() - began, curve_of(straight.output)
    assert [line["step"] for line in expected] == list(range(1, STEPS + 1)), "no gap, none double"
    struck: Counter[str] = Counter()
    finished = 0
    while struck.total() < kills:
        run = _Run(config, folder / f"run_{finished}", processes)
        while struck.total() < kills:
            if not _strike(run, moments, duration, struck.total() % 2 == 1, struck):
                break
        if run.is_unfinished():
            run.start()
            assert run.wait() == [0] * processes, run.log()
            run.check_resumed()
        assert curve_of(run.output) == expected, run.output
        _same_end(run.output, straight.output)
        finished += 1
    return dict(struck) | {"finished": finished}


def _strike(
    run: "_Run", moments: random.Random, duration: float, in_save: bool, struck: Counter[str]
) -> bool:
    """Start or resume a run and kill it; False when it was over before that."""
    run.start()
    if in_save:
        patience = moments.randrange(1, 5)  # which save of this leg
        over = not run.wait_for_saves(patience)
        time.sleep(moments.uniform(0, _AFTER_A_SAVE_BEGAN_S))
    else:
        over = run.over_within(moments.uniform(0, 0.7 * duration))
    if over or run.is_over():
        assert set(run.wait()) == {0}, run.log()
        run.check_resumed()
        return False
    run.kill(moments)
    struck[run.moment()] += 1
    print(f"kill {struck.total()}: {run.moment()}", flush=True)
    if newest := run.check_resumed():
        check_files(newest, read_manifest(newest))
    return True


class _Run:
    """One run of tools/pretrain.py in forked processes, started as often as it takes."""

    def __init__(self, config: Path, output: Path, processes: int):
        self.output, self._config, self._processes = output, config, processes
        self._children: dict[int, int] = {}
        self._codes: dict[int, int] = {}
        self._resumes_at: int | None = None
        self._log = output.with_suffix(".log")
        output.mkdir(parents=True, exist_ok=True)

    def start(self) -> None:
        """Fork the ranks."""
        newest = folders.latest_checkpoint(self.output)
        self._resumes_at = int(newest.name.removeprefix("step_")) if newest else None
        self._log.write_text("")
        self._codes = {}
        environment: dict[str, str] = {}
        if self._processes > 1:
            from tests.launch import STORE_IS_OPEN, open_store

            self._store = open_store()
            environment = STORE_IS_OPEN | {"MASTER_PORT": str(self._store.port)}
            environment |= {"WORLD_SIZE": str(self._processes), "MASTER_ADDR": "127.0.0.1"}
        for rank in range(self._processes):
            child = os.fork()
            if child == 0:
                ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if environment else {}
                os._exit(self._be_rank(environment | ranks))
            self._children[child] = rank

    def _be_rank(self, environment: dict[str, str]) -> int:
        """What the command line would do, in the child."""
        try:
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # never outlive the parent
            descriptor = os.open(self._log, os.O_WRONLY | os.O_APPEND)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            sys.stdout = os.fdopen(1, "w", buffering=1)
            sys.stderr = os.fdopen(2, "w", buffering=1)
            for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR",
                         "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE"):  # fmt: skip
                os.environ.pop(name, None)
            os.environ.update(environment)
            from tools.pretrain import main

            more = (*_MORE, f"parallel.expert_parallel_size={self._processes}")
            sys.argv = ["tools/pretrain.py", "--config", str(self._config)]
            sys.argv += [f"train.output_dir={self.output}", *more]
            return main()
        except BaseException:
            traceback.print_exc()
            return 99

    def is_over(self) -> bool:
        """Whether all ranks have ended by themselves."""
        for child in list(self._children):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                self._codes[self._children.pop(child)] = os.waitstatus_to_exitcode(status)
        return not self._children

    def over_within(self, seconds: float) -> bool:
        """Wait so long, or until it is over."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.is_over():
                return True
            time.sleep(0.005)
        return False

    def wait_for_saves(self, count: int) -> bool:
        """Wait until so many saves have begun since the start; False when it was over before."""
        seen: set[str] = set()
        while len(seen) < count:
            seen |= {path.name for path in self.output.glob("checkpoints/.writing_*")}
            if self.is_over():
                return False
            time.sleep(0.001)
        return True

    def wait(self) -> list[int]:
        """Wait for the end; exit codes in rank order."""
        while not self.is_over():
            time.sleep(0.01)
        return [self._codes[rank] for rank in sorted(self._codes)]

    def kill(self, moments: random.Random) -> None:
        """kill -9, one rank after the other."""
        children = list(self._children)
        moments.shuffle(children)
        for child in children:
            os.kill(child, signal.SIGKILL)
            if len(children) > 1:
                time.sleep(moments.uniform(0, 0.02))
        for child in children:
            os.waitpid(child, 0)
        self._children = {}

    def moment(self) -> str:
        """What the run was doing when it was killed."""
        if list(self.output.glob("checkpoints/.writing_*")):
            return "while a checkpoint was being written"
        return "between saves" if re.search(r"step \d+/", self.log()) else "before its first step"

    def check_resumed(self) -> Path | None:
        """Check that this leg went on from the checkpoint that was there; return the newest now."""
        log = self.log()
        if "resumed from" in log or re.search(r"step \d+/", log):
            expected = "new, seed" if self._resumes_at is None else f"(step {self._resumes_at})"
            assert expected in log, log
        assert "damaged" not in log, log
        return folders.latest_checkpoint(self.output)

    def is_unfinished(self) -> bool:
        """Whether steps are left."""
        newest = folders.latest_checkpoint(self.output)
        return newest is None or newest.name != folders.step_folder(STEPS)

    def log(self) -> str:
        """What all ranks of this leg have said."""
        return self._log.read_text()


def _same_end(left: Path, right: Path) -> None:
    """Compare the tensors of two finished runs, bit for bit."""
    ours, theirs = (tensors_of(folders.latest_checkpoint(run)) for run in (left, right))
    assert len(ours) > 60 and ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    from tests.rank import stand_in_for_cuda

    stand_in_for_cuda()
    arguments.folder.mkdir(parents=True)
    config = make_files(arguments.folder)
    begin = time.monotonic()
    found = soak(config, arguments.folder, arguments.kills, arguments.seed, arguments.processes)
    print(json.dumps(found | {"seconds": round(time.monotonic() - begin)}, indent=1))


if __name__ == "__main__":
    main()
