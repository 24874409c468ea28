"""Steps are taken in turn, ratios are of rounds, and a goal is an interval."""

import pytest

from pltmoe.train.benchmark.report import Goal
from pltmoe.train.benchmark.timing import Candidate, Times, measure, quartiles, ratio


def test_candidates_take_turns() -> None:
    seen: list[str] = []

    def candidate(name: str) -> Candidate:
        def step(number: int) -> float:
            seen.append(f"{name}{number}")
            return float(number)

        return Candidate(name, step, tokens=1, flops=1.0)

    times = measure([candidate("a"), candidate("b")], rounds=2, warm_up=1)
    assert seen == ["a1", "b1", "b2", "a2", "a3", "b3"]
    assert times["a"].losses == [2.0, 3.0]
    assert len(times["b"].seconds) == len(times["b"].cpu_seconds) == 2


def test_ratio_is_of_rounds_and_not_of_times() -> None:
    """The machine was twice as slow in the last rounds: no matter."""
    a = Times([2.0, 2.0, 4.0, 8.0], [2.0] * 4, [0.0] * 4)
    b = Times([1.0, 1.0, 2.0, 2.0], [1.0, 1.0, 1.0, 2.0], [0.0] * 4)
    found = ratio({"a": a, "b": b}, "a", "b")
    assert found.median == 2.0
    assert (found.lower_quartile, found.upper_quartile) == (2.0, 2.5)
    assert found.of_fastest == 2.0
    assert found.of_cpu_time == 2.0


def test_quartiles_of_few() -> None:
    assert quartiles([3.0]) == (3.0, 3.0, 3.0)
    assert quartiles([1.0, 2.0, 3.0]) == (1.5, 2.0, 2.5)


@pytest.mark.parametrize(
    ("goal", "text", "inside", "outside"),
    [
        (Goal(at_most=2.15), "at most 2.15", (0.1, 2.15), (2.16,)),
        (Goal(at_most=1.15, at_least=0.85), "0.85 to 1.15", (0.85, 1.0), (0.84, 1.16)),
    ],
)
def test_goals(
    goal: Goal, text: str, inside: tuple[float, ...], outside: tuple[float, ...]
) -> None:
    assert str(goal) == text
    assert all(goal.is_met_by(value) for value in inside)
    assert not any(goal.is_met_by(value) for value in outside)
