"""What test_pretrain.py runs on warm ranks: tools/pretrain.py, and looks into checkpoints."""

import contextlib
import io
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject

from pltmoe.runtime import distributed
from tools.pretrain import main


def run(*arguments: str) -> tuple[int, str]:
    """Run the tool as the command line does; return exit code and what went to standard error."""
    output, argv, handlers = io.StringIO(), sys.argv, logging.getLogger().handlers[:]
    sys.argv = ["tools/pretrain.py", *arguments]
    try:
        with contextlib.redirect_stderr(output), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            code = main()
    finally:
        sys.argv = argv
        logging.getLogger().handlers[:] = handlers
    return code, output.getvalue()


def run_many(cases: dict[str, list[str]]) -> dict[str, tuple[int, str]]:
    """Run the tool once per case, one after the other."""
    return {name: run(*arguments) for name, arguments in cases.items()}


def contents(folder: Path, also: str = "random") -> dict[str, Any]:
    """Return every tensor of a checkpoint by key, and one of rank 0's objects."""
    distributed.start(distributed.processes_from_environment())
    found: dict[str, Any] = dict(dist_checkpointing.load_plain_tensors(str(folder)))
    wanted = {also: ShardedObject(also, None, (1,), (0,))}
    return found | dist_checkpointing.load(wanted, str(folder))


def same(left: Any, right: Any) -> bool:
    """Compare nested values bit for bit."""
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[k], right[k]) for k in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right
