"""Times steps in turn, and compares them.

A machine is never quiet, and its clock never constant. So whatever is compared takes its steps in
turn (A B, B A, A B, ...), each round gives one ratio, and the median over the rounds is the answer.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd import DeviceType
from tqdm import tqdm

TimeRow = tuple[str, float, int]
"""Name, microseconds, calls."""


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

    prepare: Callable[[int], Callable[[], float]]
    """Makes optimizer step number n (from 1) ready; what it returns takes it and says its loss."""


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
                take = candidate.prepare(number)
                begin, cpu = now(), time.process_time()
                loss = take()
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


def profile(candidate: Candidate, number: int) -> str:
    """Return Markdown tables of the operations, and on a GPU kernels, that step ``number`` runs."""
    take = candidate.prepare(number)
    with torch.profiler.profile() as profiler:  # processor, and GPU where there is one
        begin = now()
        take()
        wall = now() - begin
    text = f"### {candidate.name}, one step\n\n{wall * 1e3:,.0f} ms with the profiler.\n\n"
    kernels, operations = device_times(profiler.profiler.kineto_results.events())
    if not kernels and torch.cuda.is_available():
        return text + "The profiler has seen no kernel.\n"  # key_averages would take minutes
    if not kernels:
        found = [(e.key, e.self_cpu_time_total, e.count) for e in profiler.key_averages()]
        return text + _time_table("operation", found)
    text += "Time on the GPU, by operation of PyTorch and by kernel:\n\n"
    text += _time_table("operation", operations) + "\n"
    return text + _time_table("kernel", kernels)


def device_times(events: Iterable[Any]) -> tuple[list[TimeRow], list[TimeRow]]:
    """Add up the kernels of a profile by name, and by the operation that starts them itself.

    ``key_averages`` does, too, but takes 0.3 ms an event; a step that fills a GPU has hundreds of
    thousands.
    """
    on_device, name_of = [], {}
    for event in events:
        if event.device_type() == DeviceType.CUDA and not event.is_user_annotation():
            on_device.append(event)
        elif not event.name().startswith("cu"):  # CUDA's own calls have numbers of their own
            name_of[event.correlation_id()] = event.name()
    kernels: dict[str, list[float]] = {}
    of_call: dict[int, float] = {}
    for event in on_device:
        kernels.setdefault(event.name(), []).append(event.duration_ns() / 1e3)
        call = event.linked_correlation_id()
        of_call[call] = of_call.get(call, 0.0) + event.duration_ns() / 1e3
    operations: dict[str, list[float]] = {}
    for call, us in of_call.items():
        operations.setdefault(name_of.get(call, "unknown"), []).append(us)
    return (
        [(name, sum(times), len(times)) for name, times in kernels.items()],
        [(name, sum(times), len(times)) for name, times in operations.items()],
    )


def _time_table(what: str, times: Iterable[TimeRow], rows: int = 20) -> str:
    """Write the most expensive rows, and one line for the rest."""
    ordered = sorted((row for row in times if row[1] > 0), key=lambda row: -row[1])
    rest = ordered[rows:]
    if rest:
        ordered[rows:] = [(f"{len(rest)} others", sum(r[1] for r in rest), sum(r[2] for r in rest))]
    total = sum(us for _, us, _ in ordered) or 1.0
    lines = [f"| {what} | ms | share | calls |", "|---|---:|---:|---:|"]
    for key, us, count in ordered:
        name = key.replace("|", "\\|")
        name = name if len(name) <= 80 else name[:77] + "..."
        lines.append(f"| {name} | {us / 1e3:,.2f} | {us / total:.1%} | {count:,} |")
    return "\n".join([*lines, f"| together | {total / 1e3:,.2f} | | |"]) + "\n"


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
