"""Recording a run: metrics.jsonl always, MLflow when ``tracking.mlflow_uri`` is set.

Importing this, and training with it, never imports mlflow; see mlflow.py for who does.
"""

from collections.abc import Callable
from pathlib import Path

from pltmoe.config import RunConfig
from pltmoe.tracking.base import EndStatus, FanOut, Tracker
from pltmoe.tracking.jsonl import JsonlTracker
from pltmoe.tracking.mlflow import MLflowTracker

__all__ = ["EndStatus", "Tracker", "build_tracker"]


def build_tracker(config: RunConfig, run_dir: Path, tokens_after: Callable[[int], int]) -> Tracker:
    """Return the tracker of a run; build it on global rank 0 only.

    Args:
        config: the run.
        run_dir: its folder.
        tokens_after: tells the tokens read after a step.

    Raises:
        ConfigError: ``tracking.mlflow_uri`` is nothing MLflow can use.
    """
    trackers: list[Tracker] = [JsonlTracker(run_dir, tokens_after)]
    if config.tracking.mlflow_uri is not None:
        trackers.append(MLflowTracker(config, run_dir))
    return FanOut(trackers)
