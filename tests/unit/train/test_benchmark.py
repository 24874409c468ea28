"""Steps are taken in turn, ratios are of rounds, and a goal is an interval."""

from types import SimpleNamespace

import pytest

from pltmoe.parallel.layout import Layout
from pltmoe.train.benchmark.pipeline import ChunkSeconds, predict
from pltmoe.train.benchmark.report import Goal, Report, markdown, row
from pltmoe.train.benchmark.timing import (
    Candidate,
    Times,
    Work,
    _time_table,
    measure,
    quartiles,
    ratio,
)


def test_candidates_take_turns() -> None:
    seen: list[str] = []

    def candidate(name: str) -> Candidate:
        def step(number: int) -> float:
            seen.append(f"{name}{number}")
            return float(number)

        return Candidate(name, tokens=1, flops=1.0, step=step)

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
    assert ratio({"a": Times([1.0]), "b": Times([2.0])}, "a", "b").of_cpu_time is None


def test_quartiles_of_few() -> None:
    assert quartiles([3.0]) == (3.0, 3.0, 3.0)
    assert quartiles([1.0, 2.0, 3.0]) == (1.5, 2.0, 2.5)


@pytest.mark.parametrize(
    ("goal", "text", "inside", "outside"),
    [
        (Goal(at_most=2.15), "at most 2.15", (0.1, 2.15), (2.16,)),
        (Goal(at_most=1.15, at_least=0.85), "0.85 to 1.15", (0.85, 1.0), (0.84, 1.16)),
        (Goal(at_least=0.45), "at least 0.45", (0.45, 0.6), (0.44,)),
    ],
)
def test_goals(
    goal: Goal, text: str, inside: tuple[float, ...], outside: tuple[float, ...]
) -> None:
    assert str(goal) == text
    assert all(goal.is_met_by(value) for value in inside)
    assert not any(goal.is_met_by(value) for value in outside)


@pytest.mark.parametrize(("seconds", "mfu", "says"), [(2.0, 0.5, "met"), (4.0, 0.25, "MISSED")])
def test_one_model_is_held_to_its_mfu(seconds: float, mfu: float, says: str) -> None:
    measured = row(Work("step", tokens=10, flops=1e15), Times([seconds]), peak_flops=1e15)
    assert measured.mfu == mfu
    report = Report("mfu", "one model", Goal(at_least=0.45), None, [measured], {}, {}, [])
    assert f"**MFU {mfu:.1%}**, goal at least 0.45: {says}." in markdown(report)
    assert f"| {mfu:.1%} |" in markdown(report)


def test_kernels_stand_beside_operations() -> None:
    """What a GPU's profile holds, written down: a table of operations and one of kernels."""
    operation = SimpleNamespace(key="aten::mm", count=3)
    kernel = SimpleNamespace(key="gemm|" + "x" * 100, count=3)
    tiny = [(SimpleNamespace(key=f"k{n}", count=1), 10.0) for n in range(3)]
    table = _time_table("kernel", [*tiny, (kernel, 60.0), (operation, 0.0)], rows=2)
    assert table.splitlines()[2:] == [
        "| gemm\\|" + "x" * 71 + "... | 0.06 | 66.7% | 3 |",
        "| k0 | 0.01 | 11.1% | 1 |",
        "| 2 others | 0.02 | 22.2% | 2 |",
        "| together | 0.09 | | |",
    ]


def test_prediction_counts_every_pass_and_one_bubble() -> None:
    """Two stages, two loops, four micro batches: 8 x (1 + 2) of work, 1 + 2 to fill and drain."""
    layout = Layout(
        world_size=2,
        micro_batch_size=1,
        global_batch_size=4,
        pipeline_parallel_size=2,
        num_loops=2,
    )
    even = [[ChunkSeconds(1.0, 2.0)] * 2 for _ in range(2)]
    assert predict(layout, even) == (27.0, 30.0), "the naive way fills and drains for each loop"
    head = [even[0], [even[1][0], ChunkSeconds(1.5, 2.5)]]
    assert predict(layout, head)[0] >= 27.0 + 4 * 1.0, "the last chunk of the last stage is slower"
    embedding = [[ChunkSeconds(1.5, 2.0), even[0][1]], even[1]]
    assert 27.0 < predict(layout, embedding)[0] < predict(layout, head)[0]
