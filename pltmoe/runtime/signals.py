"""SIGTERM, SIGUSR1 and Ctrl-C as a request: finish the step in progress, write a checkpoint.

SIGUSR1 is what a scheduler sends a while before the time limit of a job (Slurm's ``--signal``).
"""

import logging
import signal
import threading
from types import FrameType
from typing import Any

logger = logging.getLogger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Listens for these signals between ``with`` and its end; repeating them changes nothing.

    Launchers repeat signals while processes are still writing their checkpoint.
    """

    def __init__(self) -> None:
        self.signal = 0
        """Number of the first signal that came, 0 for none."""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if not self.signal:
            self.signal = number
            name = signal.Signals(number).name
            logger.info("%s: finishing this step, then saving and stopping", name)
