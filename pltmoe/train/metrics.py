"""Every metric once: its name, unit, and how it is made one number from all tokens and ranks.

Names may go on with ``/loop_2`` (that loop, mean over layers) and ``/loop_2/layer_03`` (that layer
in that loop); loops and layers count from 1. A number stands for the logged step alone, except
throughput, which is a mean since the line before.
"""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """One row of the table."""

    name: str
    unit: str
    reduction: str


METRICS: tuple[Metric, ...] = (
    Metric("train/loss", "nats per token", "mean over the loss tokens of the global batch"),
    Metric("train/tokens", "tokens", "consumed since the beginning of the run"),
    Metric("train/skipped_steps", "steps", "skipped since the beginning of the run"),
    Metric("valid/loss", "nats per token", "mean over the loss tokens of the validation batches"),
    Metric("optim/lr", "", "learning rate of the step"),
    Metric("optim/grad_norm", "", "global norm before clipping"),
    Metric("perf/seconds_per_step", "s", "mean, without validation and checkpoints"),
    Metric("perf/tokens_per_second", "tokens/s", "all ranks together"),
    Metric("perf/tokens_per_second_per_gpu", "tokens/s", "mean over ranks"),
    Metric("perf/tflops_per_gpu", "TFLOP/s", "what the model must compute; mean over ranks"),
    Metric("perf/mfu", "share of peak", "only on devices whose peak is known"),
    Metric("checkpoint/save_seconds", "s", "from the beginning of a save until it is whole"),
    Metric("checkpoint/stall_seconds", "s", "of these, how long training stood still"),
    Metric("memory/peak_gib", "GiB", "highest of all ranks"),
    Metric("moe/aux_loss", "", "Switch loss without coefficient, mean over micro batches"),
    Metric("moe/z_loss", "", "z-loss without coefficient, mean over micro batches"),
    Metric("moe/load_imbalance", "ratio", "busiest expert's tokens over the mean, global batch"),
    Metric("moe/expert_overlap", "share", "of loop 1's experts picked again, mean over tokens"),
    Metric("plt/update_size", "ratio", "|H_l - H_(l-1)| / |H_(l-1)|, mean over tokens"),
    Metric("plt/update_cosine", "cosine", "of the update and H_(l-1), mean over tokens"),
    Metric("plt/update_turn", "cosine", "of the update and the loop before's, mean over tokens"),
    Metric("plt/slot_distance", "ratio", "|h[i] - h[i-1]| / |h[i]| of what is shifted, mean"),
    Metric("plt/slot_cosine", "cosine", "of neighbouring slots of what is shifted, mean"),
    Metric("plt/gate_mean", "share", "weight of the local window, mean over tokens and heads"),
)

_PLACE = re.compile(r"(/loop_\d+)?(/layer_\d+)?$")


def metric_named(name: str) -> Metric | None:
    """Return the row of a metric name, with or without loop and layer, or None."""
    base = _PLACE.sub("", name)
    return next((metric for metric in METRICS if metric.name == base), None)
