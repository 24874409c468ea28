"""The process that sends a run to MLflow: ``python -m pltmoe.tracking.sender RUN_DIR ...``.

Started by MLflowTracker next to the training process, which it watches: when that is gone without
a word (kill -9, out of memory), it ends the run as FAILED. It works off what is on disk, so a
server may be slow, restart, or be away for hours.
"""

import argparse
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pltmoe.config import without_password
from pltmoe.errors import PLTMoEError
from pltmoe.tracking.journal import Journal, vanished
from pltmoe.tracking.jsonl import SYSTEM_METRICS_FILE, archived, sync_command
from pltmoe.tracking.store import one_line, quick_to_fail
from pltmoe.tracking.sync import close, sync

if TYPE_CHECKING:
    from pltmoe.tracking.delivery import Delivery

_POLL_S = 0.5
_LONGEST_PAUSE_S = 30.0
_BLIP_S = 10.0
"""A shorter failure is not worth a line of the log: a busy server may have one every minute."""
_LOCK_WAIT_S = 120.0
ALL_SENT, NOT_ALL_SENT, RUN_GONE = 0, 1, 2

log = logging.getLogger(__name__)


class Sender:
    """Delivers until the run has ended, was taken over by a later job, or was deleted."""

    def __init__(self, delivery: "Delivery", attempt: str, give_up_s: float) -> None:
        self._delivery = delivery
        self._journal = delivery.journal
        self._attempt = attempt
        self._give_up_s = give_up_s
        self._pause_s = 0.0
        self._failing_since: float | None = None
        self._told = False
        self._previous_done = False

    def run(self, on_drain: Callable[[], None]) -> int:
        """Work until there is nothing left to do; return the exit status."""
        from pltmoe.tracking.delivery import RunGoneError

        ended_at: float | None = None
        while self._is_current():
            if ended_at is None and self._has_ended():
                ended_at = time.monotonic()
                on_drain()
            try:
                progress = self._try(hurry=ended_at is not None)
            except RunGoneError as error:
                log.warning("%s", error)
                return RUN_GONE
            if progress is not None and not self._previous_done:
                self._previous_done = True
                end_previous(self._journal.run_dir, self._delivery.uri)
            if ended_at is not None:
                if progress is not None and not self._delivery.bytes_waiting():
                    return ALL_SENT
                ended_at = time.monotonic() if progress else ended_at
                if time.monotonic() - ended_at > self._give_up_s:
                    return NOT_ALL_SENT
            self._wait(hurry=ended_at is not None)
        return ALL_SENT

    def _try(self, hurry: bool) -> bool | None:
        """Deliver once: whether there was something, or None when the server did not answer.

        Says so when that lasts, or when the job has ended (``hurry``).
        """
        from pltmoe.tracking.delivery import UNAVAILABLE

        began = time.monotonic()
        try:
            progress = self._delivery.deliver()
        except UNAVAILABLE as error:
            now = time.monotonic()
            self._failing_since = self._failing_since or now
            if not self._told and (hurry or now - self._failing_since >= _BLIP_S):
                self._told = True
                uri = without_password(self._delivery.uri)
                log.warning("%s: %s. Training goes on, will try again", uri, one_line(error, 200))
            self._pause_s = min(max(1.0, 2 * self._pause_s), _LONGEST_PAUSE_S)
            return None
        if self._told and self._failing_since is not None:
            log.warning("answers again after %.0f s", began - self._failing_since)
        self._failing_since, self._told, self._pause_s = None, False, 0.0
        return progress

    def _wait(self, hurry: bool) -> None:
        """Pause between two attempts, but notice within a moment that the job has ended."""
        until = time.monotonic() + max(_POLL_S, min(self._pause_s, 1.0 if hurry else 1e9))
        while time.monotonic() < until:
            time.sleep(min(_POLL_S, max(0.0, until - time.monotonic())))
            if not hurry and self._has_ended():
                return

    def _is_current(self) -> bool:
        start = self._journal.last_start()
        return start is not None and start["attempt"] == self._attempt

    def _has_ended(self) -> bool:
        if self._journal.last_end() is not None:
            return True
        start = self._journal.last_start()
        if start is None or start["attempt"] != self._attempt or not vanished(start):
            return False
        close(self._journal)  # run.json may say how it ended: a full disk took no event of it
        return True


def end_previous(run_dir: Path, uri: str) -> None:
    """Send the runs that were moved away and that nobody ended (killed with their senders)."""
    for folder in archived(run_dir):
        journal = Journal(folder)
        start = journal.last_start()
        if start is None or journal.last_end() is not None:
            continue
        try:
            sync(folder, uri if start["uri"] == without_password(uri) else start["uri"])
        except (PLTMoEError, OSError) as error:
            log.warning("%s; later: %s", error, sync_command(folder))


def main() -> int:
    """Entry point of the process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--attempt", required=True)
    parser.add_argument("--give-up-after", type=float, required=True, metavar="SECONDS")
    parser.add_argument("--system-metrics", action="store_true")
    args = parser.parse_args()
    # A scheduler signals every process of a job; the training process decides what that means.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format="MLflow: %(message)s", stream=sys.stderr)
    with Journal(args.run_dir).lock(_LOCK_WAIT_S) as mine:
        if not mine:
            log.error("another process is still sending %s", args.run_dir)
            return NOT_ALL_SENT
        quick_to_fail()
        os.nice(5)  # importing mlflow takes seconds of a core that training may need
        with _sampling(args.run_dir, args.system_metrics) as stop_sampling:
            from pltmoe.tracking.delivery import Delivery

            delivery = Delivery(args.run_dir, os.environ["PLTMOE_MLFLOW_URI"])
            try:
                return Sender(delivery, args.attempt, args.give_up_after).run(stop_sampling)
            except OSError as error:  # e.g. a full disk: the end of the job cannot be written
                log.error("%s; later: %s", error, sync_command(args.run_dir))
                return NOT_ALL_SENT


@contextmanager
def _sampling(run_dir: Path, enabled: bool) -> Iterator[Callable[[], None]]:
    if not enabled:
        yield lambda: None
        return
    from pltmoe.tracking.system import SystemSampler

    sampler = SystemSampler(run_dir / SYSTEM_METRICS_FILE)
    sampler.start()
    yield sampler.stop
    sampler.stop()


if __name__ == "__main__":
    sys.exit(main())
