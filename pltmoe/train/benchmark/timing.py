"""Times steps in turn, and compares them.

A machine is never quiet, and its clock never constant. So whatever is compared takes its steps in
turn (A B, B A, A B, ...), each round gives one ratio, and the median over the rounds is the answer.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from tqdm import tqdm


@dataclass(frozen=True)
class Work:
    """What a step of something does."""

    name: str
    tokens: int
    flops: float
    """FLOPs that the model must compute (config/counts.py)."""


@dataclass(frozen=True)
class Candidate(Work):
    """Something that takes training steps, alone or with the other ranks of a run."""

    step: Callable[[int], float]
    """Takes optimizer step number n (from 1) and returns its loss."""


@dataclass(frozen=True)
class Times:
    """What was measured of one candidate, one number per round."""

    seconds: list[float]
    cpu_seconds: list[float] = field(default_factory=list)
    """Processor time of this process: other work on the machine hardly changes it."""
    losses: list[float] = field(default_factory=list)


def measure(
    candidates: Sequence[Candidate],
    rounds: int,
    warm_up: int,
) -> dict[str, Times]:
    """Let every candidate take ``warm_up`` steps, then one in each of ``rounds``, in turn.

    Args:
        candidates: all in this process; their steps change nobody else's weights.
        rounds: steps that count.
        warm_up: steps before them.
    """
    times = {c.name: Times([]) for c in candidates}
    with tqdm(total=(warm_up + rounds) * len(candidates), unit="step") as bar:
        for number in range(1, warm_up + rounds + 1):
            for candidate in candidates if number % 2 else reversed(candidates):
                bar.set_description(candidate.name)
                begin, cpu = now(), time.process_time()
                loss = candidate.step(number)
                seconds = now() - begin
                if number > warm_up:
                    kept = times[candidate.name]
                    kept.seconds.append(seconds)
                    kept.cpu_seconds.append(time.process_time() - cpu)
                    kept.losses.append(loss)
                bar.update()
    return times


@dataclass(frozen=True)
class Ratio:
    """How many times longer one candidate takes than another."""

    median: float
    """Of the rounds' ratios."""
    lower_quartile: float
    upper_quartile: float
    of_fastest: float
    """The fastest round of one over the fastest round of the other."""
    of_cpu_time: float | None
    """Median of the rounds' ratios of processor time, where that was measured."""


def ratio(times: Mapping[str, Times], slow: str, fast: str) -> Ratio:
    """Compare two candidates that were measured together."""
    a, b = times[slow], times[fast]
    per_round = [x / y for x, y in zip(a.seconds, b.seconds, strict=True)]
    cpu = [x / y for x, y in zip(a.cpu_seconds, b.cpu_seconds, strict=True)]
    lower, _, upper = quartiles(per_round)
    return Ratio(
        statistics.median(per_round),
        lower,
        upper,
        min(a.seconds) / min(b.seconds),
        statistics.median(cpu) if cpu else None,
    )


def profile(candidate: Candidate, number: int, rows: int = 20) -> str:
    """Return a table of the operations that step ``number`` spends its time in."""
    with torch.profiler.profile() as profiler:  # processor, and GPU where there is one
        candidate.step(number)
    by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    table = profiler.key_averages().table(sort_by=by, row_limit=rows, max_name_column_width=60)
    return f"{candidate.name}, one step\n{table}"


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return lower quartile, median, upper quartile (of a single value: itself)."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    lower, middle, upper = statistics.quantiles(values, n=4, method="inclusive")
    return lower, middle, upper


def now() -> float:
    """Return seconds on a clock, when all that was asked of the device is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
