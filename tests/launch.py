"""Runs a function in N fresh processes, the way torchrun would, and brings back what each returned.

    losses = run_distributed(2, "tests.distributed.cases:one_step", ep=2)     # [rank 0's, rank 1's]

Every process is a fresh interpreter with RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT
set; the function itself starts (and may leave open) its process group, whose store the test's
process keeps, as torchrun's agent does. Starting torch and Megatron costs seconds, so ``Ranks``
keeps the processes for several calls in a row:

    with Ranks(2) as ranks:
        for case in cases:
            ranks.run("tests.distributed.cases:one_step", case=case)

(the ``warm_ranks`` fixture of conftest.py is this for a test module, its processes forked by one
that has imported everything). Between two calls process groups are destroyed; a failed call ends
the processes, and the next call starts new ones.
Arguments and results travel by pickle: plain types, paths, arrays and CPU tensors are fine.
"""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.repository import PYTHONPATH, REPOSITORY

if TYPE_CHECKING:
    from torch.distributed import TCPStore

STORE_IS_OPEN = {"TORCHELASTIC_USE_AGENT_STORE": "True"}
"""What torchrun sets where its agent, not rank 0, keeps the store."""
_LOG_TAIL_BYTES = 6000
_GRACE_S = 3.0
"""How long other ranks may still report after the first failure: the second is often the cause."""


class RankError(AssertionError):
    """A rank raised, died or hung; the message carries each failing rank's traceback."""


def run_distributed(nprocs: int, target: str, **kwargs: Any) -> list[Any]:
    """Run ``target`` ("module:function") once on fresh ranks: ``Ranks.run``."""
    with Ranks(nprocs) as ranks:
        return ranks.run(target, **kwargs)


class Ranks:
    """N processes that wait for calls. Started by the first call, ended by ``close``.

    Args:
        nprocs: world size.
        env: variables on top of this process's own.
        megatron: stand in for CUDA, which imports Megatron (about 8 s a process); leave out for
            calls that need neither.
        nursery: forks the processes instead of starting them.
    """

    def __init__(
        self,
        nprocs: int,
        *,
        env: dict[str, str] | None = None,
        megatron: bool = True,
        nursery: "Nursery | None" = None,
    ):
        self.nprocs, self._env, self._megatron = nprocs, env or {}, megatron
        self._nursery = nursery
        self._processes: list[subprocess.Popen[bytes] | Forked] = []
        self._folder: Path  # while there are processes
        self._calls = 0
        self._store: TCPStore | None = None

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, target: str, *, timeout_s: float = 300.0, **kwargs: Any) -> list[Any]:
        """Call ``target`` ("module:function") on every rank; results in rank order.

        Raises:
            RankError: a rank raised, died, or was not ready after ``timeout_s`` seconds. The
                processes are gone afterwards.
        """
        if not self._processes:
            self._folder = Path(tempfile.mkdtemp(prefix="ranks_"))
            self._start()
        self._calls += 1
        folder = self._folder / f"call_{self._calls:04d}"
        folder.mkdir()
        self._store = open_store()
        call = {"target": target, "kwargs": kwargs, "port": self._store.port}
        (folder / "call.pickle").write_bytes(pickle.dumps(call))
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(f"{folder}\n".encode())
            process.stdin.flush()
        return self._collect(folder, target, timeout_s)

    def threads(self) -> list[str]:
        """Return the threads of the process with the most; old process groups leave some."""
        return max((_threads_of(process.pid) for process in self._processes), key=len, default=[])

    def close(self) -> None:
        """End the processes: idle ones leave by themselves, busy ones are killed."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in self._processes:
            try:
                process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self._processes:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._processes = []

    def _start(self) -> None:
        if self._nursery:
            self._processes = [
                self._nursery.fork(self._environment(rank), self._log(rank))
                for rank in range(self.nprocs)
            ]
            return
        for rank in range(self.nprocs):
            with open(self._log(rank), "wb") as log:
                self._processes.append(
                    subprocess.Popen(
                        [sys.executable, "-u", "-m", "tests.rank", str(int(self._megatron))],
                        cwd=REPOSITORY,
                        env=self._environment(rank),
                        stdin=subprocess.PIPE,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                    )
                )

    def _environment(self, rank: int) -> dict[str, str]:
        world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": self.nprocs}
        world["LOCAL_WORLD_SIZE"] = self.nprocs
        return {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "MASTER_ADDR": "127.0.0.1",
            "GLOO_SOCKET_IFNAME": "lo",  # the host's name may resolve to nothing in a container
            "PYTHONPATH": PYTHONPATH,
            **{key: str(value) for key, value in world.items()},
            **STORE_IS_OPEN,
            **self._env,
        }

    def _log(self, rank: int) -> Path:
        return self._folder / f"rank_{rank}.log"

    def _collect(self, folder: Path, target: str, timeout_s: float) -> list[Any]:
        deadline, failed_at = time.monotonic() + timeout_s, None
        while True:
            answers = [_read_answer(folder, rank) for rank in range(self.nprocs)]
            if all(answer and answer["ok"] for answer in answers):
                return [answer["value"] for answer in answers if answer]
            dead = [process.poll() is not None for process in self._processes]
            bad = any(a and not a["ok"] for a in answers) or any(
                gone and not a for gone, a in zip(dead, answers, strict=True)
            )
            now = time.monotonic()
            if bad and failed_at is None:
                failed_at = now
            settled = all(a or gone for a, gone in zip(answers, dead, strict=True))
            if (failed_at and (settled or now > failed_at + _GRACE_S)) or now > deadline:
                message = self._describe(answers, target, timeout_s, failed_at is None)
                self._kill()
                raise RankError(message)
            time.sleep(0.02)

    def _describe(self, answers: list[Any], target: str, timeout_s: float, timed_out: bool) -> str:
        what = f"no answer after {timeout_s:g} s" if timed_out else "failed"
        parts = [f"{target} on {self.nprocs} ranks: {what}"]
        for rank, (answer, process) in enumerate(zip(answers, self._processes, strict=True)):
            if answer and answer["ok"]:
                parts.append(f"rank {rank}: finished")
                continue
            if answer:
                parts.append(f"rank {rank} raised:\n{answer['traceback']}")
            elif process.poll() is not None:
                parts.append(f"rank {rank} died with exit status {process.returncode}")
            else:
                parts.append(f"rank {rank}: still running")
            tail = self._log(rank).read_bytes()[-_LOG_TAIL_BYTES:].decode(errors="replace").strip()
            if tail:
                parts.append(f"output of rank {rank} (end):\n{tail}")
        return "\n".join(parts)

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
        self.close()


class Forked:
    """A child of the nursery's process, used like a ``Popen``."""

    def __init__(self, pid: int, log: Path):
        self.pid, self.returncode, self._status = pid, None, log.with_suffix(".status")
        self.stdin = open(log.with_suffix(".calls"), "wb")  # waits for the child to open its end

    def poll(self) -> int | None:
        """Return the exit status, None while it runs."""
        if self.returncode is None and self._status.exists():
            self.returncode = int(self._status.read_text())
        return self.returncode

    def kill(self) -> None:
        """Send SIGKILL."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)

    def wait(self, timeout: float = 60.0) -> None:
        """Wait for the end."""
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(f"rank {self.pid}", timeout)
            time.sleep(0.01)


class Nursery:
    """A process that has imported torch and Megatron, and forks ranks: 0.1 s each, not 6.

    Forked ranks share what is drawn at random when Python starts, the order of sets of strings:
    what depends on it shows only in ranks of their own (``run_distributed``, tools/pretrain.py).
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def fork(self, environment: dict[str, str], log: Path) -> Forked:
        """Start a rank that reads its calls from a pipe beside ``log``."""
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-u", "-m", "tests.rank", "nursery"],
                cwd=REPOSITORY,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        for suffix in (".calls", ".status"):
            log.with_suffix(suffix).unlink(missing_ok=True)
        os.mkfifo(log.with_suffix(".calls"))
        assert self._process.stdin and self._process.stdout
        request = {"environment": environment, "log": str(log)}
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()
        pid = self._process.stdout.readline()
        assert pid.strip().isdigit(), "the process that forks ranks has ended"
        return Forked(int(pid), log)

    def close(self) -> None:
        """End the process; ranks that still run end with it."""
        if self._process:
            assert self._process.stdin and self._process.stdout
            self._process.stdin.close()
            self._process.wait()
            self._process.stdout.close()


def _threads_of(pid: int) -> list[str]:
    try:
        return [path.read_text().strip() for path in Path(f"/proc/{pid}/task").glob("*/comm")]
    except OSError:  # the process or one of its threads has ended since
        return []


def open_store() -> "TCPStore":
    """Open the store at which ranks meet, on a port that the system chooses: nobody can be first.

    Its ``port`` goes to the ranks as MASTER_PORT, with ``STORE_IS_OPEN``; keep it while they run.
    """
    from torch.distributed import TCPStore  # late: xdist's head imports this module, not torch

    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def _read_answer(folder: Path, rank: int) -> dict[str, Any] | None:
    path = folder / f"rank_{rank}.pickle"
    return pickle.loads(path.read_bytes()) if path.exists() else None
