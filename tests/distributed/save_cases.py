"""What test_saving.py runs on its ranks: a real engine that goes on while it is being saved."""

import errno
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import torch.distributed as dist

from pltmoe.checkpoint import folders, in_process, saving, store
from pltmoe.checkpoint.manifest import Manifest
from pltmoe.checkpoint.newest import newest_intact
from pltmoe.errors import CheckpointError
from pltmoe.train.callbacks import Checkpointing
from tests.distributed.tiny import batches, build_engine, drop_engine, tiny_config


def save_while_training(folder: Path, **changes: Any) -> dict[str, Any]:
    """Save step 2 waiting and in the background, where rank 1 is slow and steps 3, 4 are taken."""
    config = tiny_config(**changes)
    engine = build_engine(config)
    data = batches(engine.capabilities.layout)
    for step in (1, 2):
        engine.train_step(data, step, watch=False)
    manifest = Manifest(config=config, step=2)
    store.begin_save(folder / "waiting", engine.state(), manifest).finish()
    write, gate = in_process._write_file, threading.Event()
    in_process._write_file = lambda *a, **k: (gate.wait(60), write(*a, **k))[1]
    try:
        save = store.begin_save(folder / "behind", engine.state(), manifest, background=True)
        if dist.get_rank() == 0:
            gate.set()
        for step in (3, 4):
            engine.train_step(data, step, watch=False)
        seen = [save.is_written(), folders.latest_checkpoint(folder / "behind") is not None]
        gate.set()
        while not save.is_written():
            time.sleep(0.01)
        save.finish()
    finally:
        gate.set()
        in_process._write_file = write
    drop_engine()
    left = [*_saving_threads(), *psutil.Process().children()]
    return {"before its time": seen, "left over": left}


def callback_with_an_error(folder: Path) -> dict[str, Any]:
    """Rank 1 alone cannot write step 2; the next step tells both, and step 1 is left."""
    config = tiny_config(train__output_dir=str(folder), checkpoint__save_interval=1)
    engine = build_engine(config)
    data, logged = batches(engine.capabilities.layout), []
    saves = Checkpointing(
        lambda step: Manifest(config=config, step=step),
        0,
        lambda step, metrics: logged.append((step, metrics)),
    )
    trainer = SimpleNamespace(config=config, engine=engine, step=0)
    write, said = in_process._write_file, None
    try:
        for trainer.step in range(1, 5):
            engine.train_step(data, trainer.step, watch=False)
            if trainer.step == 2:
                saves.complete(2)
                if dist.get_rank() == 1:
                    in_process._write_file = _disk_full
            saves.after_step(trainer, SimpleNamespace(step=trainer.step))
    except CheckpointError as error:
        said = str(error)
    finally:
        in_process._write_file = write
    drop_engine()
    left = folders.latest_checkpoint(folder)
    return {"step": trainer.step, "said": said, "left": left, "logged": logged}


def _disk_full(*_: Any, **__: Any) -> tuple[int, OSError]:
    return 0, OSError(errno.ENOSPC, "no space")


def damaged_on_a_rank(folder: Path) -> list[str]:
    """Which of two checkpoints each rank takes when a file of the newer one has a flipped bit."""
    config = tiny_config()
    engine = build_engine(config)
    for step in (1, 2):
        manifest = Manifest(config=config, step=step)
        store.begin_save(folder / "checkpoints", engine.state(), manifest).finish()
    drop_engine()
    if dist.get_rank() == 0:
        path = folder / "checkpoints/step_00000002/__1_0.distcp"
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    dist.barrier()
    found = newest_intact(folder, verify=True)
    return [found[0].name, str(found[1].step)] if found else []


def folder_of_its_own(folder: Path) -> str:
    """Save where each rank sees a folder of that name, but not the other's."""
    saving._PATIENCE_S = 0.2
    config = tiny_config()
    engine = build_engine(config)
    manifest = Manifest(config=config, step=1)
    try:
        store.begin_save(folder / f"node{dist.get_rank()}", engine.state(), manifest).finish()
    except CheckpointError as error:
        return str(error)
    finally:
        saving._PATIENCE_S = 30.0
        drop_engine()
    return "it is whole"


def _saving_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("save ")]
