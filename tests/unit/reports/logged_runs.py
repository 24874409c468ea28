"""Runs as tracking writes them, and the rows of a report about them."""

import math
from pathlib import Path

from pltmoe.config import write_config
from pltmoe.tracking.jsonl import JsonlTracker
from tests.unit.tracking.runs import metrics_of, run_config

TAGS = {"device": "CPU (2 cores)", "layout": "EP2 x DP2", "precision": "fp32", "commit": "abc"}
DECODE = {
    "vanilla": {"ms_per_token": 8.134, "batch": 4, "context": 224, "device": "CPU (2 threads)"},
    "plt2": {"ms_per_token": 16.25, "batch": 4, "context": 224, "device": "CPU (2 threads)"},
}
NOISE = 0.01


def logged_run(folder: Path, name: str, steps: int = 200, **changes: object) -> Path:
    run_dir = folder / name
    config = run_config(run_dir, name=name, train__steps=200, **changes)
    tracker = JsonlTracker(run_dir, lambda step: step * 8 * 128)
    tracker.start(TAGS)
    write_config(config, run_dir / "config.yaml")
    for step in range(10, steps + 1, 10):
        speed = {"perf/tokens_per_second": 9000.0 + step}
        tracker.log(step, metrics_of(step, config) | speed)
    tracker.finish("FINISHED")
    return run_dir


def logged_rows(folder: Path, losses: dict[str, float], seeds: tuple[int, ...] = (1, 2)) -> Path:
    """Write runs whose last validation loss is the given one, +- half of NOISE by seed."""
    for name, last in losses.items():
        for seed in seeds:
            run_dir = folder / f"{name}-seed{seed}"
            tracker = JsonlTracker(run_dir, lambda step: step * 8 * 128)
            tracker.start({})
            write_config(run_config(run_dir, train__steps=100), run_dir / "config.yaml")
            for step in range(10, 101, 10):
                loss = last + NOISE * (seed - 1.5) + 3 * (math.exp(-step / 25) - math.exp(-4))
                tracker.log(step, {"train/loss": loss, "valid/loss": loss})
            tracker.finish("FINISHED")
    return folder


def cells(report: Path, label: str) -> list[str]:
    """The cells of the row of the report that begins with ``label``."""
    rows = [line for line in report.read_text().splitlines() if line.startswith(f"| {label}")]
    assert len(rows) == 1, label
    return [cell.strip() for cell in rows[0].strip("|").split("|")[1:]]
