"""Which numbers are a spike, what is counted, and when it has been too much."""

import json
import math

import pytest

from pltmoe.config.run import TrainConfig
from pltmoe.engines.step_guard import StepGuard
from pltmoe.errors import EngineError

ORDINARY = [(4.0, 1.0), (5.0, 1.5), (4.0, 1.0), (5.0, 1.5)]  # sigma 0.577 and 0.289


def guard(window: list[tuple[float, float]] = ORDINARY, **fields: object) -> StepGuard:
    settings = {"spike_sigma": 3.0, "spike_window": 4} | fields
    made = StepGuard(TrainConfig(output_dir="run", steps=9, global_batch_size=1, **settings))
    for loss, norm in window:
        made.accept(loss, norm)
    return made


@pytest.mark.parametrize(
    ("loss", "norm", "named"),
    [
        (6.2, 2.1, ()),
        (6.3, 1.0, ("the loss 6.3 is a spike: mean 4.5, standard deviation 0.577 of the last 4",)),
        (4.5, 2.2, ("the gradient norm 2.2 is a spike: mean 1.25, standard deviation 0.289",)),
        (9.0, 9.0, ("the loss 9 is a spike", "the gradient norm 9 is a spike")),
        (0.0, 0.0, ()),  # better than ever is welcome
    ],
)
def test_more_than_sigma_above_the_mean_is_a_spike(loss, norm, named):
    reason = guard().spike(loss, norm)
    assert (reason is not None) == bool(named)
    assert all(text in str(reason) for text in named)


def test_nothing_is_a_spike_before_the_window_is_full_or_without_sigma():
    assert guard(ORDINARY[:3]).spike(1e9, 1e9) is None
    assert guard(spike_sigma=None).spike(1e9, 1e9) is None


def test_window_moves_with_accepted_steps_only():
    moved = guard()
    moved.skip(5, "spike")
    assert moved.spike(6.3, 1.0)
    for _ in range(4):
        moved.accept(6.3, 1.0)
    assert moved.spike(6.3, 1.0) is None and moved.spike(6.4, 1.0), "no deviation at all in it"


def test_too_many_in_a_row_stop_the_run_and_an_accepted_step_forgives():
    counting = guard(max_skipped_in_a_row=2)
    for step in (5, 6):
        counting.skip(step, "the loss is bad")
    counting.accept(4.0, 1.0)
    for step in (8, 9):
        counting.skip(step, "the loss is bad")
    assert (counting.skipped, counting.in_a_row) == (4, 2)
    with pytest.raises(EngineError, match=r"step 10: the loss is bad\. The 2 step\(s\) before it"):
        counting.skip(10, "the loss is bad")
    with pytest.raises(
        EngineError, match=r"step 1: the loss is bad\. Nothing was updated or saved"
    ):
        guard(max_skipped_in_a_row=0).skip(1, "the loss is bad")


def test_state_survives_json_to_the_last_bit():
    before = guard([(math.pi, 1 / 3), *ORDINARY[1:]])
    before.skip(5, "spike")
    after = guard([])
    after.restore(json.loads(json.dumps(before.state())))
    assert after.state() == before.state()
    assert after.spike(7.0, 1.0) == before.spike(7.0, 1.0) is not None


def test_a_shorter_window_keeps_the_newest_and_no_sigma_keeps_none():
    state = guard([(1.0, 1.0), (2.0, 2.0), (3.0, 3.0), (4.0, 4.0)]).state()
    shorter, off = guard([], spike_window=2), guard([], spike_sigma=None)
    shorter.restore(state)
    off.restore(state)
    assert shorter.state()["window"] == [[3.0, 3.0], [4.0, 4.0]]
    assert off.state()["window"] == []
