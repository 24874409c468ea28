"""From seconds to tokens/s, TFLOP/s and MFU.

FLOPs are what the model must compute (config/counts.py: L times the stack, nothing for
recomputation), so that MFU compares models and machines, not implementations.
"""

from pltmoe.config import RunConfig
from pltmoe.config.counts import flops_per_token


class Throughput:
    """Collects step times and answers since the last answer."""

    def __init__(self, config: RunConfig, world_size: int, peak_flops: float | None):
        self._tokens_per_step = config.train.global_batch_size * config.data.sequence_length
        self._flops_per_token = flops_per_token(config.model, config.data.sequence_length)
        self._world_size, self._peak_flops = world_size, peak_flops
        self._seconds, self._steps = 0.0, 0

    def add(self, seconds: float) -> None:
        """Count one step that took ``seconds``."""
        self._seconds += seconds
        self._steps += 1

    def take(self) -> dict[str, float]:
        """Return the metrics of the steps since the last call, and begin anew."""
        per_step = self._seconds / max(self._steps, 1)
        self._seconds, self._steps = 0.0, 0
        tokens = self._tokens_per_step / max(per_step, 1e-9)
        flops = tokens * self._flops_per_token / self._world_size
        found = {
            "perf/seconds_per_step": per_step,
            "perf/tokens_per_second": tokens,
            "perf/tokens_per_second_per_gpu": tokens / self._world_size,
            "perf/tflops_per_gpu": flops / 1e12,
        }
        if self._peak_flops is not None:
            found["perf/mfu"] = flops / self._peak_flops
        return found
