"""One log format for all ranks. Rank 0 tells the story, the others speak up only for warnings."""

import logging
import sys
import warnings

_NOISY = ("megatron", "torch.distributed", "mlflow", "alembic", "urllib3", "py.warnings")


def configure_logging(rank: int, level: int = logging.INFO) -> None:
    """Log to standard error as ``12:30:01 rank 0 INFO trainer: message``; call once per process."""
    handler = logging.StreamHandler(sys.stderr)
    line = f"%(asctime)s rank {rank} %(levelname)s %(module)s: %(message)s"
    handler.setFormatter(logging.Formatter(line, "%H:%M:%S"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level if rank == 0 else logging.WARNING)
    logging.captureWarnings(True)
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.WARNING if rank == 0 else logging.ERROR)
    # Megatron says so at every import; the start-up block says it once, with the reason.
    warnings.filterwarnings("ignore", message=".*(Transformer Engine|[Aa]pex).*(not|Fall).*")


def log_block(logger: logging.Logger, title: str, rows: list[tuple[str, str]]) -> None:
    """Log aligned ``name  value`` rows under a title, as one record."""
    width = max(len(name) for name, _ in rows)
    lines = [f"  {name:<{width}}  {value}" for name, value in rows]
    logger.info("%s\n%s", title, "\n".join(lines))
