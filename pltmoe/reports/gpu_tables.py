"""What tools/gpu_check.py measured, as tables: targets, short runs, decoding, profiles."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import batched
from pathlib import Path
from statistics import fmean, median
from typing import Any

from pltmoe.reports.gpu_parts import FULL, PRECISIONS, RECIPES, TRAIN_STEPS, precision_words
from pltmoe.reports.markdown import table
from pltmoe.reports.runs import read_run

NOT_RUN = "Not run."
_SMOOTH = 5
"""Logged losses that a point of a compared curve is the mean of: fifty steps."""


@dataclass(frozen=True)
class Target:
    """A figure that is wanted on a GPU, and where benchmark_train.py wrote what it is made of."""

    what: str
    wanted: str
    files: tuple[str, ...]
    """Reports or runs' metrics in the work folder, given to ``value`` in this order."""
    value: Callable[..., float | None]
    is_met_by: Callable[[float], bool]
    form: str = ".3f"
    why_unknown: str = "no listed peak"
    """What it means that ``value`` is None."""


def _ratio(report: dict[str, Any]) -> float:
    return report["ratio"]["median"]


def _mfu(report: dict[str, Any]) -> float | None:
    return report["rows"][0]["mfu"]


def _faster(report: dict[str, Any], beside: dict[str, Any]) -> float:
    """Tokens per second over tokens per second: their micro batches may differ."""
    return report["rows"][0]["tokens_per_second"] / beside["rows"][0]["tokens_per_second"]


def _apart(run: dict[str, Any], beside: dict[str, Any]) -> float | None:
    """Largest difference of two loss curves, relative; each point a mean of logged steps."""
    if len(run["losses"]) != len(beside["losses"]):
        return None
    curves = [[fmean(part) for part in batched(r["losses"], _SMOOTH)] for r in (run, beside)]
    return max(abs(a / b - 1) for a, b in zip(*curves, strict=True))


def _load(path: Path) -> dict[str, Any]:
    """Read a report, or the losses of a run from its metrics.jsonl."""
    if path.suffix == ".json":
        return json.loads(path.read_text(encoding="utf-8"))
    run = read_run(path.parent)
    losses = [point.value for point in run.series("train/loss") if point.step > 1]
    return {"losses": losses, "where": {"commit": run.tag("commit") or "unknown"}}


def _targets() -> list[Target]:
    return [
        *(target for model, (words, _) in FULL.items() for target in _full_targets(model, words)),
        *(
            Target(f"FP8 {recipe}, loss curve of {TRAIN_STEPS} steps beside bf16's",
                   "within 1 %", (f"runs/plt2-{recipe}/metrics.jsonl", "runs/plt2/metrics.jsonl"),
                   _apart, lambda x: x <= 0.01, ".2%", "a run ended early")
            for recipe in RECIPES
        ),
        Target("PLT-2 step / vanilla step", "at most 2.05", ("speed/loops.json",), _ratio,
               lambda x: x <= 2.05),
        Target("our vanilla step / Megatron-core's", "at most 1.0", ("speed/megatron.json",),
               _ratio, lambda x: x <= 1.0),
    ]  # fmt: skip


def _full_targets(model: str, words: str) -> list[Target]:
    """Return those of one model that fills the device."""
    file = {precision: f"mfu-{model}-{precision}/mfu.json" for precision in PRECISIONS}
    return [
        Target(f"MFU, {words}, {precision_words(precision)}", "at least 45 %", (path,), _mfu,
               lambda x: x >= 0.45, ".1%")
        if precision.startswith("bf16")
        else Target(f"{precision_words(precision)} / bf16, {words}, tokens per second",
                    "at least 1.25", (path, file["bf16"]), _faster, lambda x: x >= 1.25)
        for precision, path in file.items()
    ]  # fmt: skip


def targets_table(work: Path) -> str:
    """Put what is wanted beside what was measured, with the commit that was measured."""
    rows = [("what", "wanted", "measured", "", "commit")]
    for target in _targets():
        paths = [work / file for file in target.files]
        if not all(path.exists() for path in paths):
            rows.append((target.what, target.wanted, "not run", "", ""))
            continue
        reports = [_load(path) for path in paths]
        value = target.value(*reports)
        commits = ", ".join(dict.fromkeys(report["where"]["commit"] for report in reports))
        if value is None:
            rows.append((target.what, target.wanted, "unknown", target.why_unknown, commits))
            continue
        verdict = "met" if target.is_met_by(value) else "MISSED"
        rows.append((target.what, target.wanted, f"{value:{target.form}}", verdict, commits))
    return table(rows, left=5)


def training_table(runs: Path, models: Sequence[str]) -> str:
    """Return last losses, median speed and memory of runs in ``runs/MODEL``.

    A run that is not there has dashes; a loss that is not finite is written as it was logged.
    """
    rows = [("model", "loss", "validation loss", "tokens/s per GPU", "MFU", "peak GiB")]
    for model in models:
        last: dict[str, Any] = {}
        speeds = []
        file = runs / model / "metrics.jsonl"
        if not file.exists():
            rows.append((model, *"-----"))
            continue
        for line in file.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            last |= record
            speeds.append(record.get("perf/tokens_per_second_per_gpu", 0.0))
        losses = [_number(last.get(f"{split}/loss", "-")) for split in ("train", "valid")]
        speed = median([s for s in speeds if s] or [0.0])
        mfu = f"{last['perf/mfu']:.1%}" if "perf/mfu" in last else "-"
        rows.append((model, *losses, f"{speed:,.0f}", mfu, f"{last['memory/peak_gib']:.2f}"))
    return table(rows)


def _number(value: float | str) -> str:
    """Round what was logged; NaN and infinity are logged as words."""
    return value if isinstance(value, str) else f"{value:.3f}"


def decoding_table(path: Path) -> str:
    """Return what tools/benchmark_decode.py measured of exported models."""
    rows = [("model", "ms per token", "cache KiB per sequence", "batch", "context", "dtype")]
    for model, r in json.loads(path.read_text(encoding="utf-8")).items():
        kib = r["cache_bytes_per_sequence"] / 1024
        row = (model, f"{r['ms_per_token']:.2f}", f"{kib:.0f}", r["batch"], r["context"])
        rows.append((*map(str, row), r["dtype"]))
    return table(rows)


def profile_page(work: Path, parts: Sequence[tuple[str, str, str]]) -> str:
    """Return a page of profiles: of each part (title, folder, comparison) what one step is made of.

    Each is a table of PyTorch's profiler, written by tools/benchmark_train.py --profile.
    """
    lines = [
        "# Where a training step's time goes",
        "",
        "Tables of PyTorch's profiler, of one step each, written by `python tools/gpu_check.py` "
        "from what it measured;",
        "not edited by hand. An operation's time is that of the kernels it starts itself; with the "
        "profiler a step takes longer.",
        "",
    ]
    not_run = []
    for title, folder, comparison in parts:
        profile = work / folder / f"{comparison}.profile.md"
        if not profile.exists():
            not_run.append(title)
            continue
        report = json.loads((work / folder / f"{comparison}.json").read_text(encoding="utf-8"))
        where = report["where"]
        lines += [
            f"## {title}",
            "",
            f"{where['device']}, commit {where['commit']}, {where['versions']}. "
            f"{report['setup']['model']}; {report['setup']['step']}. {where['command']}",
            "",
            profile.read_text(encoding="utf-8"),
        ]
    return "\n".join(lines + not_run_list(not_run))


def not_run_list(entries: Sequence[str]) -> list[str]:
    """Return the lines that end a page: what it would show if it had been run."""
    return ["## Not run", "", *(f"- {entry}" for entry in entries), ""] if entries else []
