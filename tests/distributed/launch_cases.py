"""What test_launch.py runs on its ranks."""

import os
import signal
import sys
import time

# torch is imported where it is used: most cases here start faster without it.


def sum_of_ranks(scale: int) -> tuple[int, float, int]:
    """Rank, all-reduced sum of ranks times ``scale``, and the id of this process."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    total = torch.tensor(float(dist.get_rank() * scale))
    dist.all_reduce(total)
    return dist.get_rank(), total.item(), os.getpid()


def fail_on(rank: int) -> None:
    """One rank raises before a collective in which the others then wait."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    if dist.get_rank() == rank:
        print("last words")
        raise ValueError(f"rank {rank} had enough")
    dist.barrier()


def die_on(rank: int) -> None:
    """One rank leaves without a Python exception."""
    if int(os.environ["RANK"]) == rank:
        sys.stdout.flush()
        os._exit(7)


def kill_on(rank: int) -> None:
    """One rank is killed."""
    if int(os.environ["RANK"]) == rank:
        os.kill(os.getpid(), signal.SIGKILL)


def sleep(seconds: float) -> None:
    """Too long."""
    time.sleep(seconds)


def variable(name: str) -> str | None:
    """One environment variable, as a rank sees it."""
    return os.environ.get(name)


def megatron_is_there() -> bool:
    """Megatron was imported, CUDA stood in for where there is none."""
    import torch

    torch.empty(1, device="cuda")
    return "megatron.core" in sys.modules or torch.cuda.is_available()
