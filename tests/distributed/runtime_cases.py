"""What test_runtime.py runs on its ranks."""

import torch.distributed as dist

from pltmoe.errors import DataError, EngineError
from pltmoe.runtime import distributed


def start() -> int:
    """Join the other processes; return this rank."""
    distributed.start(distributed.processes_from_environment())
    return dist.get_rank()


def collectives() -> dict[str, object]:
    """The highest value, rank 0's result, and a result that stays on rank 0."""
    rank = start()
    return {
        "highest": distributed.highest(rank * 2.5),
        "shared": distributed.on_main(lambda: f"from rank {dist.get_rank()}"),
        "kept": distributed.main_only(lambda: rank + 10),
        "main": distributed.is_main(),
    }


class OddError(Exception):
    """An error that does not survive pickling."""

    def __init__(self, first: int, second: int):
        super().__init__(f"{first} and {second}")


ERRORS = {"user": DataError("corpus: empty"), "odd": OddError(1, 2)}


def failing_on_main(error: str) -> str:
    """What a rank sees when rank 0 alone fails; and that the processes can go on."""

    def fail() -> None:
        raise ERRORS[error]

    start()
    try:
        distributed.on_main(fail)
    except (DataError, RuntimeError) as seen:
        assert distributed.highest(1) == 1
        return f"{type(seen).__name__}: {seen}"
    return "nothing"


def who_speaks(only_rank: int | None) -> bool | None:
    """Ask who tells an error of all ranks, or of one."""
    rank = start()
    if only_rank is not None and rank != only_rank:
        return None
    return distributed.speaks_for_error(EngineError("bad"), patience_s=1.0)


def without_gpu(ranks: list[int]) -> str:
    """What a rank sees when these see no GPU."""
    rank = start()
    try:
        distributed.require_like_devices(rank not in ranks)
    except EngineError as seen:
        assert distributed.highest(1) == 1
        return str(seen)
    return "nothing"
