"""Runs a function in N fresh processes, the way torchrun would, and brings back what each returned.

    losses = run_distributed(2, "tests.distributed.cases:one_step", ep=2)     # [rank 0's, rank 1's]

Every process is a fresh interpreter with RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT
set; the function itself starts (and may leave open) its process group, whose store the test's
process keeps, as torchrun's agent does. Starting torch and Megatron costs seconds, so ``Ranks``
keeps the processes for several calls in a row:

    with Ranks(2) as ranks:
        for case in cases:
            ranks.run("tests.distributed.cases:one_step", case=case)

(the ``warm_ranks`` fixture of conftest.py is this for a test module). Between two calls process
groups are destroyed; a failed call ends the processes, and the next call starts new ones.
Arguments and results travel by pickle: plain types, paths, arrays and CPU tensors are fine.
"""

import ctypes
import gc
import importlib
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.distributed import TCPStore

REPOSITORY = Path(__file__).resolve().parents[1]
STORE_IS_OPEN = {"TORCHELASTIC_USE_AGENT_STORE": "True"}
"""What torchrun sets where its agent, not rank 0, keeps the store."""
_LOG_TAIL_BYTES = 6000
_GRACE_S = 3.0
"""How long other ranks may still report after the first failure: the second is often the cause."""


class RankError(AssertionError):
    """A rank raised, died or hung; the message carries each failing rank's traceback."""


def run_distributed(
    nprocs: int,
    target: str,
    *,
    timeout_s: float = 300.0,
    env: dict[str, str] | None = None,
    **kwargs: Any,
) -> list[Any]:
    """Run ``target`` ("module:function") once on ``nprocs`` fresh ranks; results in rank order.

    Raises:
        RankError: a rank raised, died, or was not ready after ``timeout_s`` seconds.
    """
    with Ranks(nprocs, env=env) as ranks:
        return ranks.run(target, timeout_s=timeout_s, **kwargs)


class Ranks:
    """N processes that wait for calls. Started by the first call, ended by ``close``.

    Args:
        nprocs: world size.
        env: variables on top of this process's own.
        megatron: stand in for CUDA, which imports Megatron (about 8 s a process); leave out for
            calls that need neither.
    """

    def __init__(self, nprocs: int, *, env: dict[str, str] | None = None, megatron: bool = True):
        self.nprocs, self._env, self._megatron = nprocs, env or {}, megatron
        self._processes: list[subprocess.Popen[bytes]] = []
        self._folder = Path(tempfile.mkdtemp(prefix="ranks_"))
        self._calls = 0
        self._store: TCPStore | None = None

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, target: str, *, timeout_s: float = 300.0, **kwargs: Any) -> list[Any]:
        """Call ``target`` on every rank and return what each returned.

        Raises:
            RankError: see ``run_distributed``. The processes are gone afterwards.
        """
        self._folder.mkdir(exist_ok=True)
        if not self._processes:
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
        self._processes = []
        shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self) -> None:
        for rank in range(self.nprocs):
            with open(self._log(rank), "wb") as log:
                self._processes.append(
                    subprocess.Popen(
                        [sys.executable, "-u", "-m", "tests.launch", str(int(self._megatron))],
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
            "PYTHONPATH": os.pathsep.join(filter(None, [str(REPOSITORY), os.getenv("PYTHONPATH")])),
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


def open_store() -> "TCPStore":
    """Open the store at which ranks meet, on a port that the system chooses: nobody can be first.

    Its ``port`` goes to the ranks as MASTER_PORT, with ``STORE_IS_OPEN``; keep it while they run.
    """
    from torch.distributed import TCPStore  # late: xdist's head imports this module, not torch

    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def _read_answer(folder: Path, rank: int) -> dict[str, Any] | None:
    path = folder / f"rank_{rank}.pickle"
    return pickle.loads(path.read_bytes()) if path.exists() else None


def _serve() -> None:
    """Answer the calls that come in on stdin until it closes (in the child)."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: never outlive a killed pytest
    if sys.argv[1] == "1":
        stand_in_for_cuda()
    for line in sys.stdin:
        folder = Path(line.strip())
        answer = _answer(pickle.loads((folder / "call.pickle").read_bytes()))
        path = folder / f"rank_{os.environ['RANK']}.pickle"
        path.with_suffix(".part").write_bytes(answer)
        os.replace(path.with_suffix(".part"), path)
        _destroy_process_groups()


def _answer(call: dict[str, Any]) -> bytes:
    os.environ["MASTER_PORT"] = str(call["port"])
    try:
        module, _, function = call["target"].partition(":")
        value = getattr(importlib.import_module(module), function)(**call["kwargs"])
        return pickle.dumps({"ok": True, "value": value})
    except BaseException:  # SystemExit too: whatever it was, the test has to see it
        return pickle.dumps({"ok": False, "traceback": traceback.format_exc()})


def _destroy_process_groups() -> None:
    """Leave a clean process for the next call; looks only at modules the call has imported.

    The barrier keeps a rank from hanging up on one that still receives from it. After a failure
    nobody comes to it, and the test's process kills this one.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed and distributed.is_initialized():
        distributed.barrier()
        if parallel_state := sys.modules.get("megatron.core.parallel_state"):
            parallel_state.destroy_model_parallel()
        distributed.destroy_process_group()
        _free_process_groups()


def _free_process_groups() -> None:
    """Break what keeps models, and with them gloo's threads (60 a call, never idle), for ever.

    Megatron's token dispatchers keep tensors of the last forward pass; from there the way to the
    model's own gradient hooks leads through autograd's graph, which Python cannot look into.
    Methods with an lru_cache keep what they belong to.
    """
    for thing in gc.get_objects():
        kind, module = type(thing), getattr(thing, "__module__", None)
        if kind.__module__ == "megatron.core.transformer.moe.token_dispatcher":
            if hasattr(thing, "__dict__"):
                vars(thing).clear()
        elif kind.__name__ == "_lru_cache_wrapper" and str(module).startswith("megatron."):
            thing.cache_clear()
    gc.collect()


def stand_in_for_cuda() -> None:
    """Let Megatron run on a machine without a GPU; does nothing where there is one."""
    from pltmoe.runtime.cpu import stand_in_for_cuda as stand_in

    stand_in()


if __name__ == "__main__":
    _serve()
