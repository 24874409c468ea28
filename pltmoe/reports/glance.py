"""The table at the head of a comparison: each quantity once, a column per run, the paper's last.

What was not measured says so. Ratios are to the baseline, the first run with one loop.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isfinite, nan
from statistics import fmean, median
from typing import Any

from pltmoe.config.counts import count_parameters, kv_cache_bytes
from pltmoe.config.describe import variant
from pltmoe.reports import numbers, paper
from pltmoe.reports.runs import Run
from pltmoe.reports.scores import Evaluation, common_tasks

NOT_RUN = "not run"
FINAL_LINES = 5
"""Logged steps that the final training loss is the mean of."""
_CACHE_ELEMENT_BYTES = 2


@dataclass(frozen=True)
class Extras:
    """What other tools measured, by run name."""

    decode: dict[str, dict[str, Any]] = field(default_factory=dict)
    """``ms_per_token``, ``batch``, ``context``, ``device``, ``command`` of a decode benchmark."""
    generated: list[dict[str, str]] = field(default_factory=list)
    """``prompt`` and ``text`` of continuations."""
    evaluations: dict[str, Evaluation] = field(default_factory=dict)


def baseline(runs: Sequence[Run]) -> Run:
    """Return the run that ratios are to: the first with one loop, or else the first."""
    return next((run for run in runs if run.config.model.num_loops == 1), runs[0])


def at_a_glance(runs: Sequence[Run], extras: Extras) -> list[list[str]]:
    """Return the rows, the head first."""
    return [
        ["", *(run.name for run in runs), paper.TITLE],
        ["model", *(variant(run.config.model) for run in runs), paper.MODELS],
        *_sizes(runs),
        *_training(runs),
        *_caches(runs, extras),
        _decode(runs, extras),
        _scores(runs, extras),
    ]


def in_a_line(runs: Sequence[Run], extras: Extras) -> str:
    """Return each run's validation loss, and ratios to the baseline of cache and decode time."""
    first, parts = baseline(runs), []
    context = longest_context(runs)
    for run in runs:
        points = run.series("valid/loss")
        said = f"{run.name} {points[-1].value:.3f}" if points else f"{run.name} not validated"
        if run is not first:
            ratio = cache_bytes(run, context) / cache_bytes(first, context)
            said += f", KV cache {ratio:.2f}x"
            times = [extras.decode.get(r.name, {}).get("ms_per_token") for r in (run, first)]
            said += f", decoding {times[0] / times[1]:.2f}x" if all(times) else ""
        parts.append(said)
    return f"Validation loss: {'; '.join(parts)}"


def final_loss(run: Run) -> float:
    """Return the training loss, mean of the last logged steps (one step alone is noisy).

    What is no number is left out.
    """
    losses = [point.value for point in run.series("train/loss") if isfinite(point.value)]
    return fmean(losses[-FINAL_LINES:]) if losses else nan


def typical(run: Run, metric: str) -> float | None:
    """Return the median of a metric over the training, without the first logged line."""
    values = [point.value for point in run.series(metric)]
    return median(values[1:] or values) if values else None


def cache_bytes(run: Run, context: int) -> int:
    """Return the computed KV cache of one sequence, at 2 bytes a value."""
    return kv_cache_bytes(run.config.model, context, _CACHE_ELEMENT_BYTES)


def longest_context(runs: Sequence[Run]) -> int:
    """Return the longest training sequence of the runs."""
    return max(run.config.data.sequence_length for run in runs)


def _sizes(runs: Sequence[Run]) -> list[list[str]]:
    counts = [count_parameters(run.config.model) for run in runs]
    base = baseline(runs).flops_per_token
    work = [f"{numbers.flops(r.flops_per_token)} ({r.flops_per_token / base:.2f}x)" for r in runs]
    total = [numbers.flops(run.tokens * run.flops_per_token) for run in runs]
    return [
        ["parameters", *(numbers.count(c.total) for c in counts), paper.PARAMETERS],
        ["active per token", *(numbers.count(c.active) for c in counts), paper.ACTIVE],
        ["training compute per token", *work, paper.UNSTATED],
        ["tokens trained on", *(numbers.count(run.tokens) for run in runs), paper.TOKENS],
        ["training compute", *total, paper.UNSTATED],
    ]


def _training(runs: Sequence[Run]) -> list[list[str]]:
    lines = f"training loss (mean of the last {FINAL_LINES} logged steps)"
    speed = [typical(run, "perf/tokens_per_second_per_gpu") for run in runs]
    mfu = [typical(run, "perf/mfu") for run in runs]
    peak = [max((p.value for p in run.series("memory/peak_gib")), default=None) for run in runs]
    return [
        [lines, *(f"{final_loss(run):.4f}" for run in runs), paper.UNSTATED],
        ["**validation loss** (at step)", *(_valid(run) for run in runs), paper.UNSTATED],
        [
            "training tokens/s per device (median)",
            *("not logged" if s is None else f"{s:,.0f}" for s in speed),
            paper.UNSTATED,
        ],
        ["MFU (median)", *("not known" if m is None else f"{m:.1%}" for m in mfu), paper.UNSTATED],
        [
            "peak memory per device",
            *("not logged" if p is None else f"{p:.2f} GiB" for p in peak),
            paper.UNSTATED,
        ],
    ]


def _valid(run: Run) -> str:
    points = run.series("valid/loss")
    return f"**{points[-1].value:.4f}** ({points[-1].step:,})" if points else NOT_RUN


def _caches(runs: Sequence[Run], extras: Extras) -> list[list[str]]:
    context = longest_context(runs)
    base = cache_bytes(baseline(runs), context)
    sizes = [cache_bytes(run, context) for run in runs]
    computed = [f"{numbers.size_in_bytes(s)} ({s / base:.2f}x)" for s in sizes]
    label = f"KV cache per sequence of {context:,} tokens, 2 bytes a value (computed)"
    measured = []
    first = extras.decode.get(baseline(runs).name, {}).get("cache_bytes_per_sequence")
    for run in runs:
        entry = extras.decode.get(run.name, {})
        size = entry.get("cache_bytes_per_sequence")
        at = [f"{entry['context']:,} tokens"] if "context" in entry else []
        at += [entry["dtype"]] if "dtype" in entry else []
        at = [f"{size / first:.2f}x", *at] if size and first else at
        note = f" ({', '.join(at)})" if at else ""
        measured.append(numbers.size_in_bytes(size) + note if size else NOT_RUN)
    return [
        [label, *computed, paper.CACHE],
        ["KV cache per sequence (measured)", *measured, paper.CACHE],
    ]


def _decode(runs: Sequence[Run], extras: Extras) -> list[str]:
    first = extras.decode.get(baseline(runs).name, {}).get("ms_per_token")
    cells = []
    for run in runs:
        time = extras.decode.get(run.name, {}).get("ms_per_token")
        ratio = f" ({time / first:.2f}x)" if time and first else ""
        cells.append(NOT_RUN if time is None else f"{time:.2f}{ratio}")
    return ["decode ms per token (measured)", *cells, paper.LATENCY]


def _scores(runs: Sequence[Run], extras: Extras) -> list[str]:
    tasks = common_tasks(list(extras.evaluations.values()))
    cells = []
    for run in runs:
        scores = extras.evaluations.get(run.name)
        if scores is None:
            cells.append(NOT_RUN)
        else:
            cells.append(f"{scores.average(tasks):.1f}" if tasks else "no comparable task")
    label = (
        f"average score, {len(tasks)} task{'s' * (len(tasks) != 1)}" if tasks else "average score"
    )
    return [label, *cells, f"{paper.SCORE} ({paper.SCORE_TASKS} tasks)"]
