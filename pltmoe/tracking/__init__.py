"""Recording a run: metrics.jsonl always, MLflow when ``tracking.mlflow_uri`` is set.

Importing this, and training with it, never imports mlflow; see mlflow.py for who does.
"""

from pathlib import Path

from pltmoe.config import RunConfig
from pltmoe.tracking.base import EndStatus, FanOut, Terminated, Tracker, ending
from pltmoe.tracking.jsonl import JsonlTracker
from pltmoe.tracking.mlflow import MLflowTracker

__all__ = ["EndStatus", "Terminated", "Tracker", "build_tracker", "ending"]


def build_tracker(config: RunConfig, run_dir: Path) -> Tracker:
    """Return the tracker of a run; build it on global rank 0 only.

    Raises:
        ConfigError: ``tracking.mlflow_uri`` is nothing MLflow can use.
    """
    tokens_per_step = config.train.global_batch_size * config.data.sequence_length
    trackers: list[Tracker] = [JsonlTracker(run_dir, tokens_per_step)]
    if config.tracking.mlflow_uri is not None:
        trackers.append(MLflowTracker(config, run_dir))
    return FanOut(trackers)
