"""One log format for all ranks. Rank 0 tells the story, the others speak up only for warnings."""

import logging
import sys
import warnings

_THIRD_PARTY = ("megatron", "torch.distributed", "torch.utils.cpp_extension", "alembic", "urllib3")


def configure_logging(rank: int) -> None:
    """Log to standard error as ``12:30:01 rank 0 INFO message``; call it once per process."""
    handler = logging.StreamHandler(sys.stderr)
    line = f"%(asctime)s rank {rank} %(levelname)s %(message)s"
    handler.setFormatter(logging.Formatter(line, "%H:%M:%S"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    leave_out_import_warnings()


def leave_out_import_warnings() -> None:
    """Leave out what other packages say at import about libraries that are not there.

    Call it before Megatron is imported; the start-up block says what is used and why.
    """
    for name in _THIRD_PARTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"megatron\.|torch\.")
    warnings.filterwarnings("ignore", category=SyntaxWarning)


def log_block(logger: logging.Logger, title: str, rows: list[tuple[str, str]]) -> None:
    """Log aligned ``name  value`` rows under a title, as one record."""
    width = max(len(name) for name, _ in rows)
    lines = [f"  {name:<{width}}  {value}" for name, value in rows]
    logger.info("%s\n%s", title, "\n".join(lines))
