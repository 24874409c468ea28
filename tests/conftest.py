"""Set-up of the whole session: one thread per process, CUDA stood in for, processes kept warm."""

import os
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: workers share the cores
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.launch import Nursery, Ranks
from tests.rank import stand_in_for_cuda
from tests.small_disk import mounted

MANY_THREADS = 200
"""A call's process groups have 60: those of one call may be held on to, those of every call not."""


def pytest_sessionstart(session: pytest.Session) -> None:
    """Stand in for CUDA before any test module imports Megatron."""
    runs_no_tests = session.config.getoption("numprocesses", None) and not hasattr(
        session.config, "workerinput"
    )
    if not runs_no_tests:  # the controller of xdist only hands tests out
        stand_in_for_cuda()


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    """Forks the ranks of all modules; started by the first."""
    forks = Nursery()
    yield forks
    forks.close()


@pytest.fixture(scope="module")
def warm_ranks(nursery: Nursery) -> Iterator[Callable[..., list[Any]]]:
    """``warm_ranks(nprocs, "module:function", timeout_s=..., **kwargs)`` on processes kept warm.

    Use it for many small cases; ``run_distributed`` where a fresh process matters. They end with
    the module: what is left of old process groups costs processor time. Give tests
    that share the processes ``@pytest.mark.xdist_group(__name__)``, or each worker of xdist starts
    its own.
    """
    kept: dict[int, Ranks] = {}

    def call(nprocs: int, target: str, **kwargs: Any) -> list[Any]:
        return kept.setdefault(nprocs, Ranks(nprocs, nursery=nursery)).run(target, **kwargs)

    yield call
    patience = time.monotonic() + 20  # the last call's groups may still be ending
    while any(len(ranks.threads()) > MANY_THREADS for ranks in kept.values()):
        names = {nprocs: Counter(ranks.threads()) for nprocs, ranks in kept.items()}
        late = time.monotonic() > patience
        assert not late, f"process groups outlive their calls (tests/rank.py): {names}"
        time.sleep(0.1)
    for ranks in kept.values():
        ranks.close()


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Megatron's process groups for a single process (over NCCL where there is a GPU).

    Once per module: other modules end the processes of a run, and its groups with them.
    """
    from tests.single_process import create_single_process_groups  # needs torch; xdist's head not

    return create_single_process_groups(tmp_path_factory.mktemp("store"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 8 MiB; needs the right to mount."""
    with mounted(tmp_path / "disk") as folder:
        yield folder
