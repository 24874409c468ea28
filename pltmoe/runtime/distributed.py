"""Process start-up, and the few collectives that are not Megatron's: the highest, rank 0 alone.

``torchrun`` or Slurm's ``srun`` describes the processes in the environment; without either one
process runs alone, and no port is opened. NCCL carries GPU tensors and gloo carries CPU tensors in
the same group.
"""

import logging
import os
import resource
import socket
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from pltmoe.errors import EngineError, PLTMoEError, RankError

_MAIN_FAILED = "pltmoe/rank_0_has_failed"
_LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# Slurm's numbers for what is no step of srun: the batch script, the shell of salloc, ...
_FIRST_SPECIAL_STEP = 0xFFFFFFF0
_MANY_FILES = 65536

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Processes:
    """This process among all: ``rank`` of ``world_size``, ``local_rank`` on its machine."""

    rank: int
    world_size: int
    local_rank: int


def processes_from_environment() -> Processes:
    """Read what the launcher says; a single process when there is no launcher.

    Raises:
        EngineError: the launcher's variables are incomplete, or not numbers that can be.
    """
    present = [name for name in _LAUNCHER_VARIABLES if name in os.environ]
    if not present or present == ["MASTER_ADDR"] or present == ["MASTER_ADDR", "MASTER_PORT"]:
        return _slurm_task() or Processes(rank=0, world_size=1, local_rank=0)
    missing = [name for name in _LAUNCHER_VARIABLES if name not in os.environ]
    if missing:
        raise EngineError(
            f"environment has {', '.join(present)} but not {', '.join(missing)}: start with "
            "torchrun (it sets all of them), or unset them to run a single process"
        )
    rank, world_size = _integer("RANK"), _integer("WORLD_SIZE")
    if not 0 <= rank < world_size:
        raise EngineError(
            f"environment variable RANK is {rank}, of WORLD_SIZE {world_size} processes: ranks "
            "count from 0; start with torchrun (it sets both)"
        )
    if not 0 < (port := _integer("MASTER_PORT")) < 2**16:
        raise EngineError(f"environment variable MASTER_PORT is {port}, expected 1 to 65535")
    return Processes(rank, world_size, _integer("LOCAL_RANK", default=rank))


def _slurm_task() -> Processes | None:
    """Read which task of an ``srun`` step this is; None outside of one.

    A batch script and the shell of ``salloc`` have rank and size in their environment too, but
    nobody has started the other ranks.
    """
    step = os.environ.get("SLURM_STEP_ID", "")
    if not step.isdigit() or int(step) >= _FIRST_SPECIAL_STEP:
        return None
    # SLURM_NTASKS may be that of the job; a step can be smaller.
    size = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in os.environ else "SLURM_NTASKS"
    world_size = _integer(size)
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if world_size > 1 and missing:
        raise EngineError(
            f"srun started {world_size} tasks without {' and '.join(missing)}: start with the "
            "scripts in slurm/, or export the first node's name and a free port"
        )
    return Processes(_integer("SLURM_PROCID"), world_size, _integer("SLURM_LOCALID"))


def start(processes: Processes, timeout_minutes: float = 30.0) -> None:
    """Join the default process group: NCCL for GPU tensors, gloo for CPU tensors.

    Raises:
        RankError: more processes on this machine than GPUs.
        EngineError: some ranks see a GPU and some do not.
    """
    if dist.is_initialized():
        return
    _allow_many_connections()
    _leave_collectives_unchecked()
    backend = "gloo"
    if torch.cuda.is_available():
        gpus = torch.cuda.device_count()
        if processes.local_rank >= gpus:
            raise RankError(
                f"local rank {processes.local_rank} has no GPU: this machine has {gpus}; start "
                f"torchrun with --nproc-per-node {gpus} or less (srun: as many tasks per node as "
                "GPUs, all of them visible to each task)"
            )
        torch.cuda.set_device(processes.local_rank)
        backend = "cpu:gloo,cuda:nccl"
    alone = processes.world_size == 1
    dist.init_process_group(
        backend,
        rank=processes.rank,
        world_size=processes.world_size,
        store=dist.HashStore() if alone else None,
        timeout=timedelta(minutes=timeout_minutes),
    )
    if not alone:
        require_like_devices(torch.cuda.is_available())


def _allow_many_connections() -> None:
    """Raise this process's limit of open files as far as it may: each peer of a rank takes some.

    Every group connects its ranks through gloo besides NCCL, six sockets a peer in all; the usual
    limit of 1024 would end runs of some 160 ranks.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = _MANY_FILES if hard == resource.RLIM_INFINITY else min(hard, _MANY_FILES)
    if soft != resource.RLIM_INFINITY and soft < enough:
        resource.setrlimit(resource.RLIMIT_NOFILE, (enough, hard))


def _leave_collectives_unchecked() -> None:
    """Take TORCH_DISTRIBUTED_DEBUG=DETAIL as INFO: the groups that check every call have no
    reduce-scatter of several tensors."""
    if dist.get_debug_level() == dist.DebugLevel.DETAIL:
        logger.warning(
            "TORCH_DISTRIBUTED_DEBUG=DETAIL counts as INFO: with it PyTorch's groups lack a "
            "collective that Megatron-core needs"
        )
        dist.set_debug_level(dist.DebugLevel.INFO)


def require_like_devices(has_gpu: bool) -> None:
    """Check that all ranks have a GPU or none; one whose driver is gone would wait for ever.

    Raises:
        EngineError: on every rank; names those without.
    """
    with_gpu = torch.tensor(int(has_gpu))
    dist.all_reduce(with_gpu)  # through gloo, which both kinds of ranks have
    if with_gpu.item() in (0, dist.get_world_size()):
        return
    names: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(
        names, None if has_gpu else f"{dist.get_rank()} on {socket.gethostname()}"
    )
    without = [name for name in names if name]
    more = f" and {len(without) - 8} more" if len(without) > 8 else ""
    raise EngineError(
        f"no GPU is seen by rank {', '.join(without[:8])}{more}, but by others: look at nvidia-smi "
        "and CUDA_VISIBLE_DEVICES there, or leave the machine out (sbatch --exclude)"
    )


def stop() -> None:
    """Leave all process groups; harmless when there are none."""
    if dist.is_initialized():
        dist.destroy_process_group()


def is_main() -> bool:
    """Whether this is global rank 0 (also before, and without, a process group)."""
    if dist.is_initialized():
        return dist.get_rank() == 0
    task = None if "RANK" in os.environ else _slurm_task()
    return (task.rank if task else _integer("RANK", default=0)) == 0


def highest(value: float) -> float:
    """Return the highest ``value`` of all ranks; every rank must ask, all get the same answer."""
    if dist.get_world_size() == 1:
        return value
    # A CPU tensor goes through gloo and does not wait for the GPU.
    answer = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(answer, op=dist.ReduceOp.MAX)
    return answer.item()


def on_main[T](action: Callable[[], T]) -> T:
    """Run ``action`` on rank 0 while the others wait; all get its result, or its error.

    An error on rank 0 alone would leave the others waiting in the next collective for ever.
    """
    outcome: list[Any] = [None, None]  # result, error
    cause: Exception | None = None
    if dist.get_rank() == 0:
        try:
            outcome[0] = action()
        except Exception as error:  # handed to every rank and raised there
            cause, outcome[1] = error, _portable(error)
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1] from cause
    return outcome[0]


def main_only[T](action: Callable[[], T]) -> T | None:
    """Run ``action`` on rank 0; others get None, but its error if it has one.

    For results that stay on rank 0, such as an open file.
    """
    kept: list[T] = []
    on_main(lambda: kept.append(action()))
    return kept[0] if kept else None


def _is_first_here() -> bool:
    """Whether no other process of this machine comes before; also where nobody can tell."""
    try:
        return processes_from_environment().local_rank == 0
    except EngineError:  # the environment is what is wrong
        local = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or "0"
        return local == "0" or not local.isdigit()


def speaks_for_error(error: Exception, patience_s: float = 3.0) -> bool:
    """Whether this rank should print the error that ends it.

    Rank 0 speaks; another rank only where rank 0 does not fail as well within ``patience_s``.
    Before the processes have met, the first on each machine speaks (a file may be missing on one
    of them), and whoever has an error of its own (``RankError``).
    """
    if not dist.is_initialized():
        return isinstance(error, RankError) or _is_first_here()
    if is_main():
        _store().set(_MAIN_FAILED, "yes")
        return True
    try:
        _store().wait([_MAIN_FAILED], timedelta(seconds=patience_s))
    except dist.DistStoreError:  # time is up: this rank is alone with its error
        return True
    except dist.DistNetworkError:  # the store lived in rank 0, which is gone
        return False
    return False


def _store() -> dist.Store:
    return dist.distributed_c10d._get_default_store()


def _portable(error: Exception) -> Exception:
    """Return an error that survives pickling and says the same."""
    if isinstance(error, PLTMoEError):
        return type(error)(str(error))
    return RuntimeError(f"on rank 0: {type(error).__name__}: {error}")


def _integer(name: str, default: int | None = None) -> int:
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    try:
        return int(text or "")
    except ValueError:
        raise EngineError(f"environment variable {name} is {text!r}, expected a number") from None
