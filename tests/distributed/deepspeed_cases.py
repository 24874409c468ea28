"""What test_deepspeed.py runs on its ranks."""

import contextlib
import io
import sys
from contextlib import nullcontext
from pathlib import Path
from tempfile import mkdtemp
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from torch.utils import cpp_extension

from pltmoe.checkpoint import store
from pltmoe.checkpoint.manifest import Manifest, read_manifest
from pltmoe.config.deepspeed import swap_folder
from pltmoe.errors import ConfigError
from pltmoe.runtime import devices, distributed
from tests.configs import ONE_LOOP
from tests.distributed.tiny import (
    DENSE,
    MOE,
    batches,
    build_engine,
    drop_engine,
    numbers_of,
    tiny_config,
)

MODELS = {1: MOE | ONE_LOOP, 2: MOE, 3: MOE | {"num_loops": 3}}
"""By number of loops."""


def with_stage(stage: int | None) -> dict[str, Any]:
    """Return the changes that pick DeepSpeed and its ZeRO stage; Megatron's engine for None."""
    if stage is None:
        return {}
    zero: dict[str, Any] = {"stage": stage}
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = 0  # else small weights stay whole
    return {"engine": "deepspeed", "deepspeed__zero_optimization": zero}


def curve(
    stage: int | None,
    steps: int,
    model: dict[str, Any] | None = None,
    load_from: Path | None = None,
    copy_to: Path | None = None,
    save_to: Path | None = None,
    parts: tuple[str, ...] = ("optimizer", "guard"),
    **changes: Any,
) -> dict[str, Any]:
    """Take ``steps`` steps, from a checkpoint or the beginning; what was loaded goes to copy_to.

    Without the optimizer among ``parts`` a new run starts from the checkpoint's weights.
    """
    config = tiny_config(model, **with_stage(stage), **changes)
    engine, start = build_engine(config), 0
    if load_from:
        (load_from,) = load_from.glob("step_*")
        start = read_manifest(load_from).step if parts else 0
        wanted = engine.placeholders(*parts)
        engine.restore(store.load_state(load_from, wanted), start)
    if copy_to:
        store.begin_save(copy_to, engine.state(), Manifest(config=config, step=start)).finish()
    data = batches(engine.capabilities.layout, skip_steps=start)
    results = [engine.train_step(data, start + k, watch=k == steps) for k in range(1, steps + 1)]
    valid = engine.eval_step(data)
    if save_to:
        store.begin_save(
            save_to, engine.state(), Manifest(config=config, step=start + steps)
        ).finish()
    report = {
        **numbers_of(results, valid),
        "optimizer": str(engine.capabilities.backends["optimizer"]),
        "files": engine.capabilities.files,
    }
    _drop(engine)
    return report


def curves(stages: list[int | None], steps: int, **changes: Any) -> dict[int | None, Any]:
    """Return the same run with each engine."""
    return {stage: curve(stage, steps, **changes) for stage in stages}


def three_micro_batches(stages: list[int | None], expert_parallel: int) -> dict[Any, Any]:
    """Twenty steps of three micro batches with each number of loops and each stage; one layer."""
    changes = {
        "parallel__expert_parallel_size": expert_parallel,
        "train__steps": 20,
        "train__global_batch_size": 3 * dist_size(),
        "train__micro_batch_size": 1,
        "optimizer__lr": 1e-3,
        "optimizer__clip_grad_norm": 0.5,
    }
    return {
        (loops, stage): curve(stage, 20, model | {"num_layers": 1}, **changes)
        for loops, model in MODELS.items()
        for stage in stages
    }


def dist_size() -> int:
    """Return the number of processes before they have met."""
    return distributed.processes_from_environment().world_size


def sick_step(stage: int, kind: str, **changes: Any) -> dict[str, Any]:
    """Take five steps, the third with a loss or gradient that is not a number, or a spike."""
    spikes = {"train__spike_sigma": 4.0, "train__spike_window": 2} if kind == "spike" else {}
    config = tiny_config(train__steps=10, **with_stage(stage), **spikes, **changes)
    engine = build_engine(config)
    data, results, kept = batches(engine.capabilities.layout), [], []
    last = dist.get_rank() == dist.get_world_size() - 1
    for step in range(1, 6):
        batch, hook = data, None
        if step == 3 and kind == "loss" and last:
            batch = ({**b, "loss_mask": b["loss_mask"] * float("nan")} for b in data)
        if step == 3 and kind != "loss":
            factor = {"gradient": float("inf"), "spike": 1e3}[kind]
            weight = engine.model.final_norm.weight
            hook = weight.register_hook(lambda gradient, factor=factor: gradient * factor)
        if step == 3:
            kept.append(everything(engine))
        results.append(engine.train_step(batch, step, watch=False))
        if hook is not None:
            hook.remove()
        if step == 3:
            kept.append(everything(engine))
    report = {
        "skipped": [r.skipped for r in results],
        "totals": [r.skipped_steps for r in results],
        "losses": [r.loss for r in results],
        "rates": [r.learning_rate for r in results],
        "untouched": all(torch.equal(kept[0][k], kept[1][k]) for k in kept[0]),
        "counts": sorted({float(s["step"]) for s in engine._adam.state.values()}),
        "moved": any(not torch.equal(kept[1][k], v) for k, v in everything(engine).items()),
    }
    _drop(engine)
    return report


def everything(engine: Any) -> dict[str, torch.Tensor]:
    """Copy weights, expert biases, master weights and moments, whole."""
    state = engine.state()
    found = {name: bias.clone() for name, bias in engine.model.named_buffers() if "bias" in name}
    for kind, entries in state["optimizer"].items():
        found |= {f"{kind} {name}": entry.data.clone() for name, entry in entries.items()}
    weights = engine._entries(state["model"]) if engine._stage < 3 else {}
    return found | {f"weight {n}": entry.data.detach().clone() for n, entry in weights.items()}


def tensors(folders: list[Path]) -> list[dict[str, torch.Tensor]]:
    """Return every tensor of each checkpoint by key."""
    distributed.start(distributed.processes_from_environment())
    found = []
    for folder in folders:
        (checkpoint,) = folder.glob("step_*")
        found.append(dict(dist_checkpointing.load_plain_tensors(str(checkpoint))))
    return found


def quiet_start() -> tuple[str, list[str], bool]:
    """Build engines and take a step; return what was printed, which ops were compiled, and whether
    PyTorch's compiler was loaded."""
    compiled: list[str] = []
    load, cpp_extension.load = cpp_extension.load, lambda name, *a, **k: compiled.append(name)
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            for stage in (0, 1, 2, 3):
                curve(stage, 1, train__precision="bf16" if stage else "fp32")
    finally:
        cpp_extension.load = load
    return output.getvalue(), compiled, "torch._inductor.lowering" in sys.modules


def refused(case: str) -> str:
    """Try to build an engine that cannot be; return what it says."""
    zero = {"stage": 1}
    if case == "wrong value":
        zero |= {"stage": 2, "reduce_bucket_size": 0.5}
    if case == "no compiler":
        zero["offload_optimizer"] = {"device": "cpu"}
    if case == "bf16 by itself":
        zero["stage"] = 0
    folder, model = Path(mkdtemp()), None
    if case in ("no disk", "no libaio", "a file"):
        path = folder / "gone" if case == "no disk" else folder
        disk = {"device": "nvme", "nvme_path": str(path)}
        zero, model = {"stage": 3, "offload_optimizer": disk}, DENSE
    config = tiny_config(model, engine="deepspeed", deepspeed__zero_optimization=zero)
    if case == "a file":
        swap_folder(config).touch()
    bf16 = mock.patch.object(devices, "parameter_dtype", lambda precision: torch.bfloat16)
    bare = mock.patch.dict("os.environ", {"PATH": "/nowhere", "TORCH_EXTENSIONS_DIR": str(folder)})
    try:
        patches = {"bf16 by itself": bf16, "no compiler": bare, "no libaio": bare}
        with patches.get(case, nullcontext()):
            build_engine(config)
    except ConfigError as error:
        return str(error)
    finally:
        drop_engine()
    return "nothing was refused"


def _drop(engine: Any) -> None:
    if hasattr(engine, "_engine"):
        engine._engine.destroy()
    drop_engine()
