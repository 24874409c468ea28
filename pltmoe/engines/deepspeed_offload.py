"""The optimizer of DeepSpeed whose state lies in host memory: compiled here, once for a machine."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from pltmoe.errors import ConfigError
from pltmoe.runtime.distributed import is_main

logger = logging.getLogger(__name__)


def build_cpu_adam(groups: list[dict[str, Any]], options: dict[str, Any]) -> torch.optim.Optimizer:
    """Build DeepSpeed's Adam for state in host memory; it is compiled at its first use.

    Raises:
        ConfigError: it cannot be compiled here.
    """
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    try:
        with _one_compiler():
            return DeepSpeedCPUAdam(groups, adamw_mode=True, **options)
    except Exception as error:  # no compiler, no ninja, no headers: each has its own error
        why = " ".join(str(error.__cause__ or error).split()) or type(error).__name__
        raise ConfigError(
            "deepspeed.zero_optimization.offload_optimizer needs DeepSpeedCPUAdam, which cannot "
            f"be compiled here ({why[:300]}): install a C++ compiler and ninja, or remove "
            "offload_optimizer"
        ) from error


@contextmanager
def _one_compiler() -> Iterator[None]:
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
        if is_main() and not list(folder.glob("*/*.so")):
            logger.info("compiling DeepSpeed's CPU Adam in %s: about a minute, once", folder)
        os.environ[variable] = str(folder)
        try:
            yield
        finally:
            del os.environ[variable]
            os.environ.update({} if before is None else {variable: before})


def compile_folder() -> Path:
    """Return where DeepSpeed's kernels are compiled; PyTorch's variable moves it."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or "~/.cache/torch_extensions"
    version = f"py{sys.version_info.major}{sys.version_info.minor}_torch{torch.__version__}"
    return Path(root).expanduser() / f"pltmoe_{version}"
