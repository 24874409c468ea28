"""The engine protocol: what a trainer may ask of whatever computes a step.

An engine owns the model, the optimizer and the learning rate, and knows how they are spread over
processes. The trainer owns data order, time, logging and files.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from pltmoe.parallel.layout import Layout
from pltmoe.runtime.devices import Backend

Batch = Mapping[str, Tensor]
"""One micro batch: ``tokens``, ``labels``, ``position_ids`` [b, s] int64, ``loss_mask`` [b, s]."""


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did; the same on every rank."""

    loss: float
    """Mean cross entropy over the loss tokens of the global batch, before the update, in nats."""
    grad_norm: float
    """Global norm of the gradients, before clipping."""
    learning_rate: float
    """Learning rate of this step."""
    model_metrics: dict[str, float] = field(default_factory=dict)
    """Routing and gates per loop and layer, when they were asked for."""


@dataclass(frozen=True)
class Capabilities:
    """What runs, for the start-up block: layout, precision, and who computes what, and why."""

    layout: Layout
    precision: str
    backends: dict[str, Backend]
    """Job (``attention``, ``norm``, ``experts``, ``optimizer``) -> implementation and reason."""


class Engine(Protocol):
    """Takes optimizer steps."""

    capabilities: Capabilities

    def train_step(self, batches: Iterator[Batch], step: int, watch: bool) -> StepResult:
        """Take optimizer step number ``step`` (from 1) on this rank's share of a global batch.

        Args:
            batches: yields at least ``layout.micro_batches`` micro batches.
            step: for error messages.
            watch: also gather ``model_metrics``.

        Raises:
            EngineError: loss or gradient is not finite; no weight has been updated.
        """
        ...

    def eval_step(self, batches: Iterator[Batch]) -> tuple[float, int]:
        """Return the summed loss of one global batch, and how many tokens it is over."""
        ...

    def state(self) -> dict[str, Any]:
        """Return the sharded state to save: ``model``, ``optimizer`` and ``random``."""
        ...

    def placeholders(self, *parts: str, expert_bias: bool = True) -> dict[str, Any]:
        """Return the sharded state to be filled from a checkpoint.

        Args:
            parts: any of ``model``, ``optimizer``, ``random``. Random states belong to ranks: they
                can only be asked for when as many processes wrote them.
            expert_bias: whether the checkpoint has the experts' biases.
        """
        ...

    def restore(self, loaded: dict[str, Any], step: int) -> None:
        """Take what a checkpoint filled into ``placeholders``; ``step`` steps have been taken.

        Without the optimizer's part, the optimizer starts afresh from the loaded weights.
        """
        ...
