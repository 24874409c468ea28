"""Steps are taken in turn, ratios are of rounds, and a goal is an interval."""

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType

from pltmoe.config import RunConfig, load_config
from pltmoe.errors import ConfigError, EngineError
from pltmoe.parallel.layout import Layout, layout_for
from pltmoe.train.benchmark import candidates, compare
from pltmoe.train.benchmark.compare import Measured, check_losses
from pltmoe.train.benchmark.configs import ZERO, check
from pltmoe.train.benchmark.pipeline import ChunkSeconds, predict
from pltmoe.train.benchmark.report import Goal, Report, row, write
from pltmoe.train.benchmark.timing import (
    Candidate,
    Times,
    Work,
    _time_table,
    device_times,
    measure,
    profile,
    quartiles,
    ratio,
)
from tests.repository import CONFIGS


def quickstart(*overrides: str) -> RunConfig:
    one_rank = "parallel.expert_parallel_size=1"
    return load_config(CONFIGS / "quickstart_plt2.yaml", [one_rank, *overrides])


def test_candidates_take_turns() -> None:
    seen: list[str] = []

    def candidate(name: str) -> Candidate:
        def prepare(number: int) -> Callable[[], float]:
            time.sleep(0.02)
            seen.append(f"{name}{number}")
            return lambda: float(number)

        return Candidate(name, tokens=1, flops=1.0, prepare=prepare)

    times = measure([candidate("a"), candidate("b")], rounds=2, warm_up=1)
    assert seen == ["a1", "b1", "b2", "a2", "a3", "b3"]
    assert times["a"].losses == [2.0, 3.0]
    assert len(times["b"].seconds) == len(times["b"].cpu_seconds) == 2
    assert min(times["a"].seconds) < 0.02, "what makes a step ready is not in its time"


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
def test_one_model_is_held_to_its_mfu(
    seconds: float, mfu: float, says: str, tmp_path: Path
) -> None:
    measured = row(Work("step", tokens=10, flops=1e15), Times([seconds]), peak_flops=1e15)
    assert measured.mfu == mfu
    report = Report(
        "mfu", "one model", Goal(at_least=0.45), None, [measured], {}, {"odd": "\udce9"}, []
    )
    text = write(report, "", tmp_path)[1].read_text()  # a path that is no UTF-8 costs no result
    assert f"**MFU {mfu:.1%}**, goal at least 0.45: {says}." in text
    assert f"| {mfu:.1%} |" in text and r"- odd: \udce9" in text


def test_a_profiles_table_has_few_rows_and_one_for_the_rest() -> None:
    tiny = [(f"k{n}", 10.0, 1) for n in range(3)]
    table = _time_table(
        "kernel", [*tiny, ("gemm|" + "x" * 100, 60.0, 3), ("aten::mm", 0.0, 3)], rows=2
    )
    assert table.splitlines()[2:] == [
        "| gemm\\|" + "x" * 71 + "... | 0.06 | 66.7% | 3 |",
        "| k0 | 0.01 | 11.1% | 1 |",
        "| 2 others | 0.02 | 22.2% | 2 |",
        "| together | 0.09 | | |",
    ]


def event(name: str, number: int, us: float = 0.0, by: int = 0, gpu: bool = True) -> Any:
    """One of a profile, as PyTorch's profiler keeps it."""
    kind = DeviceType.CUDA if gpu else DeviceType.CPU
    fields = {"name": name, "correlation_id": number, "duration_ns": us * 1e3}
    fields |= {"linked_correlation_id": by, "device_type": kind}
    fields["is_user_annotation"] = name == "step"
    return SimpleNamespace(**{key: lambda value=value: value for key, value in fields.items()})


def test_kernels_and_the_operations_that_start_them_are_added_up() -> None:
    """A call of CUDA's has a number of its own, which may be that of an operation."""
    found = device_times(
        [
            event("gemm", 70, 2.0, by=1), event("gemm", 71, 3.0, by=2), event("sum", 72, 1.0, by=2),
            event("copy", 73, 4.0), event("step", 74, 99.0, by=1),
            event("aten::mm", 1, gpu=False), event("_Linear", 2, gpu=False),
            event("cudaLaunchKernel", 2, by=1, gpu=False), event("cudaMemcpyAsync", 1, gpu=False),
        ]
    )  # fmt: skip
    kernels, operations = found
    assert kernels == [("gemm", 5.0, 2), ("sum", 1.0, 1), ("copy", 4.0, 1)]
    assert operations == [("aten::mm", 2.0, 1), ("_Linear", 4.0, 1), ("unknown", 4.0, 1)]
    with torch.profiler.profile() as profiler:
        torch.ones(2) + 1
    events = profiler.profiler.kineto_results.events()
    assert device_times(events) == ([], [])
    assert events[0].duration_ns() >= 0 and not events[0].is_user_annotation(), "all that is read"


def test_a_gpus_profile_without_kernels_takes_no_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    text = profile(Candidate("a", 1, 1.0, lambda number: lambda: float(torch.ones(1))), 1)
    assert text.endswith("The profiler has seen no kernel.\n") and "aten::ones" not in text


def test_a_profile_that_fails_takes_nothing_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    candidate = Candidate("a", 1, 1.0, lambda number: lambda: float(number))
    monkeypatch.setattr(compare, "profile", lambda *_: 1 / 0)
    measured = compare.in_turn(lambda *_: [candidate])(None, None, compare.Options(2, 0, True))
    assert len(measured.times["a"].seconds) == 2
    assert measured.profiles == ["### a\n\nNot profiled: ZeroDivisionError: division by zero\n"]
    monkeypatch.setattr(candidates, "engines", lambda *_: ([candidate], ["holds 3 MiB"]))
    both = compare.engines(None, None, compare.Options(2, 0, True))
    assert both.profiles == measured.profiles and both.notes == ["holds 3 MiB"]


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


@pytest.mark.parametrize(
    ("name", "override", "says"),
    [
        ("megatron", "parallel.recompute=full", r"set parallel.recompute \(is full\) to none"),
        ("megatron", "parallel.tensor_parallel_size=2", r"tensor_parallel_size \(is 2\) to 1"),
        ("megatron", "parallel.pipeline_parallel_size=2", r"pipeline_parallel_size \(is 2\) to 1"),
        ("megatron", "parallel.context_parallel_size=2", r"context_parallel_size \(is 2\) to 1"),
        ("megatron", "model.moe_expert_bias_update_rate=0.1", r"rate \(is 0.1\) to 0"),
        ("megatron", "engine=deepspeed", r"set engine \(is deepspeed\) to megatron"),
        ("megatron", "train.gradient_accumulation_fusion=true", "fusion .is true. to false"),
        ("engines", "parallel.context_parallel_size=2", f"{ZERO}: .*parallel.context_parallel_si"),
        ("precision", "train.gradient_accumulation_fusion=true", None),
        ("loops", "parallel.recompute=full", None),
    ],
)
def test_what_cannot_be_compared_is_refused(name: str, override: str, says: str | None) -> None:
    config = quickstart(override)
    if says is None:
        check(name, config, 2)
        return
    with pytest.raises(ConfigError, match=says):
        check(name, config, 2)
    with pytest.raises(EngineError, match="cannot be split"):
        check("mfu", quickstart("parallel.expert_parallel_size=4"), 2)


def test_an_engine_whose_ratio_is_wanted_is_not_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where only building it shows that it cannot run."""

    def weighed(name: str, *_: object) -> tuple[str, str]:
        if name in refused:
            raise ConfigError(name)
        return name, "note"

    monkeypatch.setattr(candidates, "_weighed", weighed)
    refused = {"DeepSpeed, ZeRO 0"}
    found, notes = candidates.engines(quickstart(), None)  # type: ignore[arg-type]
    assert "left out: DeepSpeed, ZeRO 0" in notes and ZERO in found
    refused = {ZERO}
    with pytest.raises(ConfigError, match=ZERO):
        candidates.engines(quickstart(), None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("precision", "apart", "is_same"),
    [("fp32", 1e-6, True), ("fp32", 3.4e-2, False), ("bf16", 3e-4, True), ("bf16", 3.4e-2, False),
     ("fp8", 1e-2, True), ("fp32", float("nan"), False)],
)  # fmt: skip
def test_times_of_different_work_are_refused(precision: str, apart: float, is_same: bool) -> None:
    works = [Work(name, 1, 1.0) for name in ("ours", "theirs", "a variant")]
    losses = {"ours": [7.0, 7.0], "theirs": [7.0, 7.0], "a variant": [7.0, 7.0 - apart]}
    found = Measured(works, {name: Times([], [], of) for name, of in losses.items()})
    if is_same:
        check_losses(found, "ours", precision)
        return
    with pytest.raises(EngineError, match="losses of ours and a variant differ by"):
        check_losses(found, "ours", precision)


def test_batches_are_drawn_before_a_step_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    config, drawn = quickstart(), []
    monkeypatch.setattr(
        candidates, "random_batches", lambda *of: (drawn.append(of[-1]) for _ in range(2))
    )
    layout = layout_for(config, 1)
    take = candidates._candidate("x", config, layout, lambda of: len(list(of))).prepare(7)
    assert drawn == [7, 7] and take() == 2.0
