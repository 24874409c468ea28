"""A rank of tests/launch.py, or the process that forks them: what runs on the other side.

    python -m tests.rank 0|1|nursery

waits for calls on stdin, and answers them in files.
"""

import ctypes
import faulthandler
import gc
import importlib
import json
import os
import pickle
import select
import signal
import sys
import traceback
from functools import partial
from pathlib import Path
from typing import Any

_WRITE = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
_KEEP_TENSORS = (
    "megatron.core.transformer.moe.token_dispatcher",
    "megatron.core.pipeline_parallel.fine_grained_activation_offload",
)
_KEEP_WEIGHTS = {
    "BF16_Optimizer",
    "DeepSpeedEngine",
    "DeepSpeedZeRoOffload",
    "DeepSpeedZeroOptimizer",
    "DeepSpeedZeroOptimizer_Stage3",
}
_CACHES: list[Any] = []
"""Methods of Megatron with an lru_cache that the nursery has imported."""


def _main() -> None:
    """Be a rank (argument 0 or 1: with Megatron) or the nursery."""
    _die_with_parent()
    if sys.argv[1] != "0":
        stand_in_for_cuda()
    if sys.argv[1] == "nursery":
        _fork_on_request()
    else:
        _serve()


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: never outlive a killed pytest


def _fork_on_request() -> None:
    """Fork a rank for each line on stdin; write down how each ended."""
    import cpuinfo

    import pltmoe.engines.deepspeed
    import pltmoe.engines.megatron  # noqa: F401  so that no child has to

    # Each optimizer of DeepSpeed on the CPU asks, and it takes seconds of starting programs.
    cpuinfo.get_cpu_info = partial(dict, cpuinfo.get_cpu_info())
    _CACHES.extend(thing for thing in gc.get_objects() if _is_cache_of_megatron(thing))
    gc.collect()
    gc.freeze()  # what is imported is not looked through between any two calls
    logs: dict[int, Path] = {}
    ended, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    while True:
        ready, _, _ = select.select([0, ended], [], [])
        if ended in ready:
            os.read(ended, 4096)
            _note_the_ended(logs)
        elif not (line := _read_line()):
            return
        else:
            request = json.loads(line)
            pid = os.fork()
            if pid == 0:
                os.close(ended)
                _become_a_rank(request["environment"], Path(request["log"]))
            logs[pid] = Path(request["log"])
            print(pid, flush=True)


def _read_line() -> bytes:
    """Read stdin up to a line's end, and nothing behind it: select does not see Python's buffer."""
    line = b""
    while not line.endswith(b"\n") and (byte := os.read(0, 1)):
        line += byte
    return line


def _note_the_ended(logs: dict[int, Path]) -> None:
    while logs:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        path = logs.pop(pid).with_suffix(".status")
        path.with_suffix(".part").write_text(str(os.waitstatus_to_exitcode(status)))
        os.replace(path.with_suffix(".part"), path)


def _become_a_rank(environment: dict[str, str], log: Path) -> None:
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _die_with_parent()
    os.environ.clear()
    os.environ.update(environment)
    calls, output = os.open(log.with_suffix(".calls"), os.O_RDONLY), os.open(log, _WRITE)
    for source, target in ((calls, 0), (output, 1), (output, 2)):
        os.dup2(source, target)
    try:
        _serve()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def _serve() -> None:
    """Answer the calls that come in on stdin until it closes."""
    faulthandler.enable(2)  # a crash in C code shows the stack of every thread
    for line in open(0, closefd=False):
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
    if "megatron.core" in sys.modules:
        _free_process_groups()  # of a run that has ended its own, too


def _free_process_groups() -> None:
    """Break what keeps models, and with them gloo's threads (60 a call, never idle), for ever.

    Some of Megatron's objects keep tensors of the last forward pass; from there the way to the
    model's own gradient hooks leads through autograd's graph, which Python cannot look into.
    Methods with an lru_cache keep what they belong to. DeepSpeed's optimizers hang on the weights'
    hooks, and its groups in a module.
    """
    if groups := sys.modules.get("deepspeed.utils.groups"):
        groups.mpu = None
        groups._EXPERT_PARALLEL_GROUP.clear()
        groups._EXPERT_DATA_PARALLEL_GROUP.clear()
    for thing in gc.get_objects():
        kind = type(thing)
        if kind.__module__ in _KEEP_TENSORS or kind.__name__ in _KEEP_WEIGHTS:
            if hasattr(thing, "__dict__"):
                vars(thing).clear()
        elif _is_cache_of_megatron(thing):
            thing.cache_clear()
    for cache in _CACHES:
        cache.cache_clear()
    gc.collect()
    if gc.get_freeze_count() == 0:  # a trainer has ended
        gc.freeze()


def _is_cache_of_megatron(thing: Any) -> bool:
    if type(thing).__name__ != "_lru_cache_wrapper":
        return False
    return str(getattr(thing, "__module__", None)).startswith("megatron.")


def stand_in_for_cuda() -> None:
    """Let Megatron run on a machine without a GPU; does nothing where there is one."""
    from pltmoe.runtime.cpu import stand_in_for_cuda as stand_in

    stand_in()


if __name__ == "__main__":
    _main()
