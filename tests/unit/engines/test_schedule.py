"""Learning rates against the formulas, step by step."""

import math
from types import SimpleNamespace

import pytest

from pltmoe.engines.megatron_optimizer import build_schedule
from tests.distributed.tiny import tiny_config

PEAK, END, WARMUP, STEPS = 1e-2, 1e-3, 3, 12


def rates(schedule: str, **changes) -> list[float]:
    """Learning rate of each step and of two steps after the end."""
    config = tiny_config(
        optimizer__lr=PEAK,
        optimizer__min_lr=END,
        optimizer__warmup_steps=WARMUP,
        optimizer__schedule=schedule,
        train__steps=STEPS,
        **changes,
    )
    optimizer = SimpleNamespace(param_groups=[{"lr": None}, {"lr": None, "wd_mult": 0.0}])
    scheduler, seen = build_schedule(config, optimizer), []
    for _ in range(STEPS + 2):
        seen.append(optimizer.param_groups[0]["lr"])
        scheduler.step(1)
    assert optimizer.param_groups[0]["weight_decay"] == 0.1
    assert optimizer.param_groups[1]["weight_decay"] == 0.0
    return seen


def fraction(k: int, end: int = STEPS) -> float:
    """How far step k (counted from 0) is through the decay."""
    return min(1.0, (k - WARMUP) / (end - WARMUP))


@pytest.mark.parametrize(
    ("schedule", "share_at", "changes"),
    [
        ("cosine", lambda k: (1 + math.cos(math.pi * fraction(k))) / 2, {}),
        ("linear", lambda k: 1 - fraction(k), {}),
        ("constant", lambda k: 1.0, {}),
        ("wsd", lambda k: min(1.0, max(0, STEPS - k) / 4), {"optimizer__wsd_decay_steps": 4}),
        ("linear", lambda k: 1 - fraction(k, 8), {"optimizer__decay_steps": 8}),
    ],
)
def test_rates_equal_the_formula(schedule, share_at, changes):
    got = rates(schedule, **changes)
    for k, rate in enumerate(got):
        if k <= WARMUP:
            assert rate == pytest.approx(PEAK * k / WARMUP), k
        else:
            assert rate == pytest.approx(END + (PEAK - END) * share_at(k)), k
