"""Notices a rank that hangs: the stacks of all ranks are written, the culprit is named, all end.

    main thread     mark("data of step 7") ... mark("forward and backward of step 7") ...
    watcher         too long since the last mark, or another rank says so?
                      stacks of all threads -> standard error and OUTPUT_DIR/logs/stacks_rank_N.txt
                      who is behind? -> log of every rank, OUTPUT_DIR/logs/ranks_behind.txt
                      exit code 75
    messenger       tells the other ranks through the store at which they met, and listens
    faulthandler    a C thread that the watcher winds up again and again: where it fails to, because
                    C code holds Python's lock, stacks go to standard error; exit code 1

All ranks pass the same marks in the same order, so the rank with the fewest is behind. A hang on a
GPU does not show like this, because kernels are only queued: NCCL's flight recorder
(TORCH_FR_BUFFER_SIZE, TORCH_NCCL_DUMP_ON_TIMEOUT) does.
"""

import faulthandler
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType, TracebackType

import torch.distributed as dist

from pltmoe.runtime.hang_report import Sighting, report

logger = logging.getLogger(__name__)

HANG_EXIT_CODE = 75
"""EX_TEMPFAIL: try again; the run resumes from its last checkpoint."""

RANKS_BEHIND = "ranks_behind.txt"
"""The ranks that were behind, a number a line, for slurm/pretrain.sh; no file: not known."""

_SLACK = 3.0
_PATIENCE_S = 15.0
"""How long silent ranks are waited for, and how long the last to leave lingers."""
_KEY = "pltmoe/heartbeat"
_STANDARD_ERROR = 2
_LAUNCHER_KEEPS_STORE = "TORCHELASTIC_USE_AGENT_STORE"


@dataclass(frozen=True)
class _Mark:
    number: int
    doing: str
    since: float
    allowed_s: float


class Heartbeat:
    """Watches this process between ``with`` and its end; ``mark`` says that it is alive."""

    def __init__(self, timeout_s: float | None, folder: Path):
        """Prepare.

        Args:
            timeout_s: without a mark for so long, the job is ended; None: never.
            folder: where ``stacks_rank_N.txt`` and ``ranks_behind.txt`` are written, made when it
                is needed.
        """
        self._timeout_s, self._folder = timeout_s, folder
        self._mark = _Mark(0, "beginning", time.monotonic(), 0.0)
        self._leave, self._poll_s = threading.Event(), 0.0
        self._ending = threading.Event()
        self._threads: list[threading.Thread] = []
        self._messenger: _Messenger | None = None

    def mark(self, doing: str, slack: bool = False) -> None:
        """Note that this point was reached; every rank must pass it.

        Args:
            doing: what begins here, with its step.
            slack: it may take three times as long as usual.
        """
        allowed_s = (self._timeout_s or 0.0) * (_SLACK if slack else 1.0)
        self._mark = _Mark(self._mark.number + 1, doing, time.monotonic(), allowed_s)

    def __enter__(self) -> "Heartbeat":
        if self._timeout_s is not None:
            self.mark("beginning", slack=True)
            self._poll_s = min(5.0, self._timeout_s / 10)
            if _rank() == 0:
                with suppress(OSError):  # of a former hang; a message follows where it matters
                    (self._folder / RANKS_BEHIND).unlink()
            self._wind_up(self._mark)
            if dist.is_initialized() and dist.get_world_size() > 1:
                self._messenger = _Messenger()
                self._start(self._listen, "heartbeat messenger")
            self._start(self._watch, "heartbeat watcher")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        if self._ending.is_set():  # an error that the end of other ranks has caused
            threading.Event().wait()
        self._leave.set()
        for thread in self._threads:
            thread.join(self._poll_s)
        if self._threads:
            faulthandler.cancel_dump_traceback_later()

    def _start(self, target: Callable[[], None], name: str) -> None:
        self._threads.append(threading.Thread(target=target, name=name, daemon=True))
        self._threads[-1].start()

    def _watch(self) -> None:
        while not self._leave.wait(self._poll_s):
            mark = self._mark
            self._wind_up(mark)
            seconds = time.monotonic() - mark.since
            if seconds > mark.allowed_s:
                self._end(f"no progress for {seconds:.0f} s in: {mark.doing}")
            if self._messenger and self._messenger.alarm.is_set():
                self._end(f"another rank makes no progress; {seconds:.0f} s in: {mark.doing}")

    def _wind_up(self, mark: _Mark) -> None:
        """Let faulthandler end the process if the watcher does not come back to wind it up."""
        seconds = mark.allowed_s + self._poll_s
        faulthandler.dump_traceback_later(seconds, exit=True, file=_STANDARD_ERROR)

    def _listen(self) -> None:
        """Exchange words with the store, where a silent rank 0 may hold this thread for ever."""
        assert self._messenger is not None
        try:
            while not self._leave.is_set():
                self._messenger.exchange(self._sighting())
                self._leave.wait(self._poll_s)
        except dist.DistError:  # the store is gone, with the rank or launcher that kept it
            return

    def _sighting(self) -> Sighting:
        mark, (place, waits) = self._mark, _main_thread()
        return Sighting(mark.number, mark.doing, time.monotonic() - mark.since, place, waits)

    def _end(self, why: str) -> None:
        """Write stacks, ask who is behind, and leave; what blocks is cut off by faulthandler."""
        self._ending.set()
        faulthandler.dump_traceback_later(4 * _PATIENCE_S, exit=True, file=_STANDARD_ERROR)
        sighting = self._sighting()
        path = self._folder / f"stacks_rank_{_rank()}.txt"
        stacks = _stacks()  # now: when other ranks leave, the main thread moves on with an error
        logger.error("%s; the stacks of all threads, also in %s:\n%s", why, path, stacks)
        answer, behind = self._messenger.settle(sighting) if self._messenger else report([sighting])
        logger.error("%s", answer)
        known = self._folder / RANKS_BEHIND
        if behind and not known.exists():  # a later word may only be that rank 0 has left
            self._write(known, "".join(f"{rank}\n" for rank in behind))
        self._write(path, f"{why}\n{answer}\n\n{stacks}")
        logger.error("exit code %d: the run resumes from its last checkpoint", HANG_EXIT_CODE)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        if self._messenger:
            self._messenger.linger()
        os._exit(HANG_EXIT_CODE)  # the main thread will never get to a clean end

    def _write(self, path: Path, text: str) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            logger.error("%s: cannot be written (%s)", path, error.strerror)


class _Messenger:
    """Words between the ranks about who hangs, over a connection of its own."""

    def __init__(self) -> None:
        self._store = dist.distributed_c10d._get_default_store().clone()
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self.alarm = threading.Event()
        """Some rank hangs."""

    def exchange(self, sighting: Sighting) -> None:
        """Publish where this rank is, and look whether some rank hangs."""
        self._store.set(f"{_KEY}/{self._rank}", json.dumps(asdict(sighting)))
        if self._store.check([f"{_KEY}/alarm"]):
            self.alarm.set()

    def settle(self, sighting: Sighting) -> tuple[str, Sequence[int]]:
        """Raise the alarm, wait for all ranks to answer, and return who is behind, as ``report``.

        The ranks are returned where the text was made; others get the text alone.
        """
        found: list[tuple[str, Sequence[int]]] = []
        thread = threading.Thread(
            target=lambda: found.append(self._settle(sighting)), name="heartbeat", daemon=True
        )
        thread.start()
        thread.join(2 * _PATIENCE_S)
        if found:
            return found[0]
        # Slurm has no launcher that could have kept it.
        return (
            "no progress, and the store at which the ranks met does not answer: the launcher, or "
            "rank 0 where no launcher keeps it, is stopped, dead or cut off. This is rank "
            f"{self._rank}, in: {sighting.doing}, at {sighting.place}"
        ), [] if _LAUNCHER_KEEPS_STORE in os.environ else [0]

    def _settle(self, sighting: Sighting) -> tuple[str, Sequence[int]]:
        store, behind = self._store, []
        store.set(f"{_KEY}/{self._rank}", json.dumps(asdict(sighting)))
        first = store.add(f"{_KEY}/answers", 1) == 1
        store.set(f"{_KEY}/answered/{self._rank}", "yes")
        store.set(f"{_KEY}/alarm", "yes")
        until = time.monotonic() + _PATIENCE_S + (0 if first else 5)
        while time.monotonic() < until:
            if first and store.add(f"{_KEY}/answers", 0) == self._world:
                break
            if not first and store.check([f"{_KEY}/report"]):
                break
            time.sleep(0.2)
        if first or not store.check([f"{_KEY}/report"]):
            text, behind = report([self._ask(rank) for rank in range(self._world)])
            store.set(f"{_KEY}/report", text)
        return store.get(f"{_KEY}/report").decode(), behind

    def _ask(self, rank: int) -> Sighting | None:
        if not self._store.check([f"{_KEY}/{rank}"]):
            return None
        sighting = Sighting(**json.loads(self._store.get(f"{_KEY}/{rank}")))
        return replace(sighting, answers=self._store.check([f"{_KEY}/answered/{rank}"]))

    def linger(self) -> None:
        """Let the others read before rank 0 leaves, which may take the store with it."""
        if self._rank == 0:
            time.sleep(2.0)


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _stacks() -> str:
    """Return the Python stacks of all threads."""
    with open(os.memfd_create("stacks"), "w+b") as memory:  # faulthandler writes to descriptors
        faulthandler.dump_traceback(memory)
        memory.seek(0)
        return memory.read().decode(errors="replace")


def _main_thread() -> tuple[str, bool]:
    """Return where the main thread is, outside of PyTorch, and whether it waits for others."""
    frame: FrameType | None = sys._current_frames().get(threading.main_thread().ident or 0)
    waits, place = False, ""
    while frame is not None:
        name = frame.f_code.co_filename
        waits |= f"torch{os.sep}distributed" in name
        if not place and f"{os.sep}torch{os.sep}" not in name:
            place = f"{Path(name).name}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return place, waits
