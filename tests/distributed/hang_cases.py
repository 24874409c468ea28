"""One rank of a small job that hangs: ``python -m tests.distributed.hang_cases KIND FOLDER``."""

import ctypes
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from pltmoe.runtime import distributed
from pltmoe.runtime.heartbeat import Heartbeat
from pltmoe.runtime.logs import configure_logging

TIMEOUT_S = 8.0
ENDLESS_S = 600


def hang(kind: str) -> None:
    """Hang in one of the ways in which ranks do."""
    if kind == "slack":
        ctypes.CDLL(None).sleep(ENDLESS_S)
    elif kind == "lock":  # C code that never gives Python's lock back
        ctypes.PyDLL(None).sleep(ENDLESS_S)
    elif kind == "stop_0":
        os.kill(os.getpid(), signal.SIGSTOP)


def main() -> None:
    """Take steps of one all-reduce; in step 3 the last rank hangs (the first one: stop_0)."""
    kind, folder = sys.argv[1], Path(sys.argv[2])
    processes = distributed.processes_from_environment()
    configure_logging(processes.rank)
    distributed.start(processes)
    culprit = 0 if kind == "stop_0" else processes.world_size - 1
    with Heartbeat(TIMEOUT_S, folder) as heartbeat:
        for step in range(1, 200):
            heartbeat.mark(f"data of step {step}", slack=kind == "slack")
            if step == 3 and processes.rank == culprit:
                hang(kind)
            time.sleep(0.3)
            heartbeat.mark(f"sum of step {step}")
            dist.all_reduce(torch.ones(()))
    distributed.stop()
    print("finished")


if __name__ == "__main__":
    main()
