"""Which steps must not change the model: loss or gradient not finite, or far above the ordinary.

A skipped step leaves weights, optimizer and expert biases alone; its data count as consumed, and
step number and learning rate move on. What is ordinary is told by the last accepted steps:

    spike:  value - mean(window) > train.spike_sigma * standard deviation(window)

for the loss or the gradient norm, upwards only, once the window is full. (OLMo-core's
SkipStepOptimizer has 6 sigma over 128 steps. There skipped steps enter the window too, so a row of
spikes soon looks ordinary; here it stops the run.)
"""

from collections import deque
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any

from pltmoe.config.run import TrainConfig
from pltmoe.errors import EngineError


class StepGuard:
    """Counts skipped steps and remembers the accepted ones; the same on every rank."""

    def __init__(self, train: TrainConfig):
        """Begin with an empty window."""
        self._train = train
        self._window: deque[tuple[float, float]] = deque(maxlen=train.spike_window)
        self.skipped = 0
        """Steps skipped since the beginning of the run."""
        self.in_a_row = 0
        """Steps skipped since the last accepted one."""

    @property
    def looks_for_spikes(self) -> bool:
        """Whether finite steps may be skipped as well."""
        return self._train.spike_sigma is not None

    def spike(self, loss: float, norm: float) -> str | None:
        """Say why these finite numbers are out of the ordinary, or None if they are not."""
        sigma, size = self._train.spike_sigma, self._train.spike_window
        if sigma is None or len(self._window) < size:
            return None
        losses, norms = zip(*self._window, strict=True)
        found = [
            f"the {name} {value:.6g} is a spike: mean {fmean(window):.6g}, standard deviation "
            f"{stdev(window):.3g} of the last {size} accepted steps (train.spike_sigma {sigma:g})"
            for name, value, window in (("loss", loss, losses), ("gradient norm", norm, norms))
            if _is_far_above(value, window, sigma)
        ]
        return " and ".join(found) or None

    def accept(self, loss: float, norm: float) -> None:
        """Remember a step that is taken."""
        self.in_a_row = 0
        if self.looks_for_spikes:
            self._window.append((loss, norm))

    def skip(self, step: int, reason: str) -> None:
        """Count a step that is not taken.

        Raises:
            EngineError: more than ``train.max_skipped_in_a_row`` in a row.
        """
        limit = self._train.max_skipped_in_a_row
        if self.in_a_row >= limit:
            earlier = (
                f"The {limit} step(s) before it were skipped too (train.max_skipped_in_a_row). "
                if limit
                else ""
            )
            raise EngineError(f"step {step}: {reason}. {earlier}{_ADVICE}")
        self.skipped += 1
        self.in_a_row += 1

    def state(self) -> dict[str, Any]:
        """Return counters and window as plain types, to be saved."""
        window = [list(pair) for pair in self._window]
        return {"skipped": self.skipped, "in_a_row": self.in_a_row, "window": window}

    def restore(self, state: dict[str, Any]) -> None:
        """Take what ``state`` returned; a shorter window keeps the newest steps."""
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]
        self._window.clear()
        if self.looks_for_spikes:
            self._window.extend((loss, norm) for loss, norm in state["window"])


_ADVICE = (
    "Nothing was updated or saved: resume from the last checkpoint with a lower optimizer.lr or "
    "optimizer.clip_grad_norm, or look at the data of this step"
)


def _is_far_above(value: float, window: Sequence[float], sigma: float) -> bool:
    mean = fmean(window)
    return value - mean > sigma * stdev(window, mean)
