"""A scheduler signals every process of a job; what loads data has to outlive that."""

import multiprocessing
import subprocess

from pltmoe.data.datasets import batches
from tests.unit.data.datasets import Numbers


def test_loaders_outlive_the_signals_of_others_and_end_with_the_trainer():
    """With shipped settings (num_workers 2) a SIGTERM to the job used to crash it, unsaved."""
    before = set(multiprocessing.active_children())
    loader = batches(Numbers(100), consumed_samples=0, micro_batch_size=1, dp_rank=0, dp_size=1,
                     num_workers=1)  # fmt: skip
    assert next(loader)["tokens"].item() == 0
    (worker,) = set(multiprocessing.active_children()) - before
    for name in ("TERM", "USR1", "TERM"):
        subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)
    assert [next(loader)["tokens"].item() for _ in range(20)] == list(range(1, 21))
    worker.terminate()
    worker.join(10)
    assert worker.exitcode == 0
