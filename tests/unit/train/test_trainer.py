"""The loop alone: which steps it takes, from which data, who is called, and when it stops."""

import gc
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from pltmoe.checkpoint.manifest import Manifest
from pltmoe.engines.base import StepResult
from pltmoe.runtime import distributed
from pltmoe.runtime.signals import StopRequest
from pltmoe.train.callbacks import Callback
from pltmoe.train.consumed import Consumed
from pltmoe.train.trainer import Outcome, StepReport, Trainer
from tests.distributed.tiny import tiny_config


class CountingEngine:
    """Notes what it is asked for."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, bool, Any]] = []

    def train_step(self, batches: Iterator[Any], step: int, watch: bool) -> StepResult:
        self.calls.append((step, watch, next(batches)))
        return StepResult(loss=1.0, grad_norm=1.0, learning_rate=0.1)


class Notes(Callback):
    """Writes down its calls; asks to stop at a step."""

    def __init__(self, name: str, log: list[Any], stop: StopRequest, stop_at: int | None = None):
        self.name, self.log, self.stop, self.stop_at = name, log, stop, stop_at

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        self.log.append((self.name, report.step))
        if report.step == self.stop_at:
            self.stop.signal = signal.SIGTERM

    def after_last_step(self, trainer: Trainer) -> None:
        self.log.append((self.name, "end"))


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    monkeypatch.setattr(distributed.dist, "get_world_size", lambda: 1)


def trainer(
    step: int = 0, sequences: int = 0, stop_at: int | None = None, **changes: Any
) -> tuple[Any, ...]:
    engine, log, stop = CountingEngine(), [], StopRequest()
    config = tiny_config(train__steps=6, train__log_interval=4, **changes)
    callbacks = [Notes("first", log, stop, stop_at), Notes("second", log, stop)]

    def batches(consumed: int) -> Iterator[int]:
        return iter(range(consumed, 10**6))

    consumed = Consumed(8, 8 * 16, step, sequences)
    return Trainer(config, engine, batches, callbacks, stop, consumed), engine, log


def test_takes_every_step_and_watches_the_logged_ones():
    loop, engine, log = trainer()
    assert loop.fit() is Outcome.FINISHED
    assert [(step, watch) for step, watch, _ in engine.calls] == [
        (1, True),
        (2, False),
        (3, False),
        (4, True),
        (5, False),
        (6, True),
    ]
    assert log[:4] == [("first", 1), ("second", 1), ("first", 2), ("second", 2)]
    assert log[-2:] == [("first", "end"), ("second", "end")]


def test_garbage_collections_do_not_look_through_what_start_up_made():
    loop, engine, _ = trainer()
    count, seen = gc.get_freeze_count(), []
    take = engine.train_step
    engine.train_step = lambda *a, **k: seen.append(len(gc.get_objects())) or take(*a, **k)
    loop.fit()
    assert max(seen) < 20_000 < len(gc.get_objects())
    assert gc.get_freeze_count() <= count


def test_goes_on_where_the_data_was_left():
    loop, engine, _ = trainer(step=4, sequences=21)
    assert loop.fit() is Outcome.FINISHED
    assert [step for step, _, _ in engine.calls] == [5, 6]
    assert engine.calls[0][2] == 21, "not four steps of eight: the batch was smaller then"


def test_what_was_read_before_a_resume_is_the_manifests():
    config = tiny_config()
    manifest = Manifest(config=config, step=4, consumed_samples=21, tokens=500)
    consumed = Consumed.of(config, manifest)
    assert (consumed.sequences_after(6), consumed.tokens_after(6)) == (21 + 16, 500 + 16 * 16)


def test_stops_after_the_step_in_which_it_was_asked_to():
    loop, engine, log = trainer(stop_at=2)
    assert loop.fit() is Outcome.STOPPED
    assert loop.step == 2 and loop.stop_signal == signal.SIGTERM
    assert log[-1] == ("second", "end"), "callbacks still save"


def test_asked_to_stop_before_its_first_step_it_takes_none():
    loop, engine, log = trainer(step=4, sequences=32)
    loop._stop.signal = signal.SIGINT
    assert loop.fit() is Outcome.STOPPED
    assert (loop.step, loop.stop_signal, engine.calls) == (4, signal.SIGINT, [])
    assert log == [("first", "end"), ("second", "end")]


def test_asked_to_stop_in_the_last_step_it_has_finished():
    loop, _, _ = trainer(stop_at=6)
    assert loop.fit() is Outcome.FINISHED
