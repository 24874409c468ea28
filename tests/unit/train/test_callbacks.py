"""What callbacks make of a step: its validation loss, and the numbers of its line."""

from types import SimpleNamespace

import pytest

from pltmoe.engines.base import StepResult
from pltmoe.runtime import distributed
from pltmoe.train.callbacks import LogLine, Validation
from pltmoe.train.consumed import Consumed
from pltmoe.train.throughput import Throughput
from pltmoe.train.trainer import StepReport
from tests.distributed.tiny import tiny_config


def test_validation_is_a_mean_over_tokens_of_the_same_batches_and_after_the_last_step():
    batches = [(6.0, 2), (2.0, 6), (99.0, 1)]
    validation, found = Validation(lambda: iter(batches)), {}
    changes = {"train__eval_interval": 2, "train__eval_steps": 2, "data__split": [98, 2, 0]}
    trainer = SimpleNamespace(
        config=tiny_config(train__steps=5, **changes),
        engine=SimpleNamespace(eval_step=next),
        heartbeat=SimpleNamespace(mark=lambda *_, **__: None),
    )
    for step in range(1, 6):
        report = StepReport(step, StepResult(1.0, 1.0, 0.1), 1.0)
        validation.after_step(trainer, report)
        found[step] = report.metrics.get("valid/loss")
    assert found == {1: None, 2: 1.0, 3: None, 4: 1.0, 5: 1.0}


def test_a_line_counts_all_steps_since_the_last_and_a_skipped_one_is_told_at_once(monkeypatch):
    monkeypatch.setattr(distributed.dist, "get_world_size", lambda: 1)
    config, found = tiny_config(train__steps=9), {}
    line = LogLine(Throughput(config, 1, None))
    trainer = SimpleNamespace(
        config=config,
        consumed=Consumed(8, 128, step=4, sequences=10, tokens=500),
        is_logged=lambda step: step % 3 == 0,
    )
    for step, seconds in enumerate((1.0, 5.0, 2.0, 3.0, 4.0), start=5):
        skips = step == 7
        result = StepResult(step / 2, 0.5, 0.1, {}, 3 * (step >= 7), skips)
        found[step] = report = StepReport(step, result, seconds)
        line.after_step(trainer, report)
    assert [step for step in found if found[step].metrics] == [6, 7, 9]
    told = {"train/loss": 3.5, "train/skipped_steps": 3.0, "optim/grad_norm": 0.5}
    assert found[7].metrics == told
    for step, seconds, tokens in ((6, 3.0, 756.0), (9, 3.0, 1140.0)):
        metrics = found[step].metrics
        assert metrics["perf/seconds_per_step"] == pytest.approx(seconds)
        assert metrics["train/tokens"] == tokens
