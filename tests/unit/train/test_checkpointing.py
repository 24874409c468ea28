"""The saving callback: one save at a time, told when it waits, and how an error ends one."""

import logging
import threading
from types import SimpleNamespace

import pytest
import torch
from megatron.core.dist_checkpointing import ShardedTensor

from pltmoe.checkpoint import folders
from pltmoe.checkpoint.manifest import Manifest
from pltmoe.errors import EngineError
from pltmoe.runtime.tokenizer_files import read_tokenizer
from pltmoe.train.callbacks import Checkpointing
from pltmoe.train.pretrain import _end_save
from tests.distributed.tiny import tiny_config

WAIT_S = 0.3


@pytest.fixture
def run(groups, tmp_path):
    """A callback and a trainer whose state is one tensor; what is logged is in ``logged``."""
    tokenizer = tmp_path / "tokenizer.model"
    tokenizer.write_bytes(b"pieces")
    changes = {"train__output_dir": str(tmp_path), "data__tokenizer": str(tokenizer)}
    config = tiny_config(checkpoint__save_interval=1, **changes)
    logged = []
    saves = Checkpointing(
        lambda step: Manifest(config=config, step=step),
        0,
        lambda step, metrics: logged.append((step, metrics)),
        read_tokenizer(tokenizer),
    )
    tokenizer.unlink()  # a save does not need it any more
    weight = torch.zeros(4)
    shards = lambda: {"w": ShardedTensor.from_rank_offsets("model.w", weight)}  # noqa: E731
    trainer = SimpleNamespace(config=config, step=0, engine=SimpleNamespace(state=shards))

    def step():
        trainer.step += 1
        weight.fill_(trainer.step)
        saves.after_step(trainer, SimpleNamespace(step=trainer.step))

    return SimpleNamespace(saves=saves, trainer=trainer, step=step, logged=logged, folder=tmp_path)


def saved_steps(run) -> list[int]:
    found = folders.complete_checkpoints(run.folder / "checkpoints")
    return [int(folder.name.removeprefix("step_")) for folder in found]


def test_a_second_save_waits_for_the_first_and_says_so(run, gate, caplog):
    caplog.set_level(logging.INFO)
    run.step()
    assert saved_steps(run) == [] and not run.logged
    threading.Timer(WAIT_S, gate.set).start()
    run.step()
    assert "step 2 is to be saved, but step 1 is still being written" in caplog.text
    assert saved_steps(run) == [1]
    folder = run.folder / "checkpoints/step_00000001"
    assert (folder / "tokenizer.model").read_bytes() == b"pieces"
    ((step, first),) = run.logged
    assert step == 2 and first["checkpoint/stall_seconds"] > 0.8 * WAIT_S, "the wait counts"
    run.saves.after_last_step(run.trainer)
    assert saved_steps(run) == [1, 2] and len(run.logged) == 2
    assert [t.name for t in threading.enumerate() if t.name.startswith("save ")] == []


def test_a_step_is_saved_once(run, gate):
    gate.set()
    run.step()
    run.saves.after_last_step(run.trainer)
    run.saves.after_last_step(run.trainer)
    assert saved_steps(run) == [1] and len(run.logged) == 1


def test_a_save_is_completed_when_training_stops_on_all_ranks(run, gate):
    """An EngineError is raised by every rank, and the state was saved before it."""
    run.step()
    gate.set()
    _end_save(run.saves, 1, EngineError("step 2: the loss is not finite"))
    assert saved_steps(run) == [1]


def test_a_save_is_given_up_when_only_this_rank_may_have_failed(run, gate):
    run.step()
    _end_save(run.saves, 1, RuntimeError("out of memory"))
    gate.set()
    for thread in threading.enumerate():
        if thread.name.startswith("save "):
            thread.join(10)
            assert not thread.is_alive()
    assert saved_steps(run) == []
