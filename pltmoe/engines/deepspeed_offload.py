"""What DeepSpeed's offload needs: its Adam on the CPU, and its reads and writes of a disk.

Both are compiled here, once for a machine.
"""

import hashlib
import logging
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from pltmoe.config import RunConfig
from pltmoe.config.deepspeed import swap_folder
from pltmoe.errors import ConfigError
from pltmoe.runtime.distributed import is_main

logger = logging.getLogger(__name__)


def build_cpu_adam(groups: list[dict[str, Any]], options: dict[str, Any]) -> torch.optim.Optimizer:
    """Build DeepSpeed's Adam for state in host memory; it is compiled at its first use.

    Raises:
        ConfigError: it cannot be compiled here.
    """
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    if is_main() and os.environ.get("OMP_NUM_THREADS") == "1" and (os.cpu_count() or 1) > 1:
        logger.warning(
            "the optimizer in host memory runs on one thread of each process, because "
            "OMP_NUM_THREADS is 1 (torchrun's own choice): set it to the cores of a process"
        )
    try:
        with _one_compiler("cpu_adam"):
            return DeepSpeedCPUAdam(groups, adamw_mode=True, **options)
    except Exception as error:  # no compiler, no ninja, no headers: each has its own error
        raise ConfigError(
            "deepspeed.zero_optimization.offload_optimizer needs DeepSpeedCPUAdam, which cannot "
            f"be compiled here ({_why(error)}): install a C++ compiler and ninja, or remove "
            "offload_optimizer"
        ) from error


def prepare_disk(config: RunConfig) -> None:
    """Compile what reads and writes the optimizer on a disk, and look for the disk.

    Raises:
        ConfigError: it cannot be compiled here, or the folder is not there or is read-only.
    """
    from deepspeed.ops.op_builder import AsyncIOBuilder

    where = "deepspeed.zero_optimization.offload_optimizer.nvme_path"
    folder = swap_folder(config)
    if not folder.parent.is_dir():
        raise ConfigError(f"{where} ({folder.parent}) is no folder on {platform.node()}")
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{where} ({folder.parent}) cannot be written: {error}") from error
    try:
        with _one_compiler("async_io"):
            AsyncIOBuilder().load(verbose=False)
    except Exception as error:
        raise ConfigError(
            f"{where} ({folder.parent}) needs DeepSpeed's async_io, which cannot be compiled here "
            f"({_why(error)}): install a C++ compiler, ninja and libaio (libaio-dev), or set "
            "offload_optimizer.device to cpu"
        ) from error


def _why(error: Exception) -> str:
    return " ".join(str(error.__cause__ or error).split())[:300] or type(error).__name__


@contextmanager
def _one_compiler(name: str) -> Iterator[None]:
    """Let one process at a time compile, in a folder of ours, and the others find what it made.

    PyTorch marks a folder that it compiles in with a file, and waits for ever for that file to go:
    a run killed in that minute would hang every later one. This lock goes with its process.
    """
    folder, variable = compile_folder(), "TORCH_EXTENSIONS_DIR"
    folder.mkdir(parents=True, exist_ok=True)
    before = os.environ.get(variable)
    # ninja lies beside the interpreter, which need not be on PATH.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    with FileLock(folder / "pltmoe.lock"):
        for left in folder.glob("*/lock"):
            left.unlink()
        if is_main() and not (folder / name / f"{name}.so").exists():
            logger.info("compiling DeepSpeed's %s in %s: minutes, once", name, folder)
        os.environ[variable] = str(folder)
        try:
            yield
        finally:
            del os.environ[variable]
            os.environ.update({} if before is None else {variable: before})


def compile_folder() -> Path:
    """Return where DeepSpeed's kernels are compiled for this environment.

    PyTorch's variable moves it. Two environments would compile each other's again and again.
    """
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or "~/.cache/torch_extensions"
    environment = hashlib.sha1(f"{sys.prefix} {torch.__version__}".encode()).hexdigest()[:12]
    return Path(root).expanduser() / f"pltmoe_{environment}"
