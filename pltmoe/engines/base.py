"""The engine protocol: what a trainer may ask of whatever computes a step.

An engine owns the model, the optimizer and the learning rate, and knows how they are spread over
processes. The trainer owns data order, time, logging and files.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from pltmoe.parallel.layout import Layout
from pltmoe.runtime.devices import Backend
from pltmoe.runtime.fp8 import Branch

Batch = Mapping[str, Tensor]
"""One micro batch: ``tokens``, ``labels``, ``position_ids`` [b, s] int64, ``loss_mask`` [b, s]."""


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did; the same on every rank."""

    loss: float
    """Mean cross entropy over the loss tokens of the global batch, before the update, in nats."""
    grad_norm: float
    """Global norm of the gradients, before clipping; NaN where the loss is not finite."""
    learning_rate: float
    """Learning rate of this step."""
    model_metrics: dict[str, float] = field(default_factory=dict)
    """Routing and gates per loop and layer, when they were asked for."""
    skipped_steps: int = 0
    """Steps of the run so far that changed nothing."""
    skipped: bool = False
    """Whether this was one of them."""


@dataclass(frozen=True)
class Capabilities:
    """What runs, for the start-up block: layout, precision, and who computes what, and why."""

    layout: Layout
    precision: str
    backends: dict[str, Backend | Branch]
    """Job (``attention``, ``norm``, ``experts``, ``optimizer``) -> implementation and reason; in
    FP8 also what each attention branch computes in."""
    files: dict[str, str] = field(default_factory=dict)
    """Name -> text of what is kept beside config.yaml."""


class Engine(Protocol):
    """Takes optimizer steps."""

    capabilities: Capabilities

    def train_step(self, batches: Iterator[Batch], step: int, watch: bool) -> StepResult:
        """Take optimizer step number ``step`` (from 1) on this rank's share of a global batch.

        Where loss or gradient is not finite, or a spike by ``train.spike_sigma``, the step is
        skipped on all ranks: weights, optimizer and expert biases stay as they are.

        Args:
            batches: yields at least ``layout.micro_batches`` micro batches.
            step: for error messages.
            watch: also gather ``model_metrics``.

        Raises:
            EngineError: more than ``train.max_skipped_in_a_row`` steps in a row were to be skipped.
        """
        ...

    def eval_step(self, batches: Iterator[Batch]) -> tuple[float, int]:
        """Return the summed loss of one global batch, and how many tokens it is over."""
        ...

    def state(self) -> dict[str, Any]:
        """Return the sharded state to save: ``model``, ``optimizer``, ``random`` and ``guard``;
        ``fp8_scales`` where the next pass takes scales of earlier ones.
        """
        ...

    def placeholders(self, *parts: str, absent: Sequence[str] = ()) -> dict[str, Any]:
        """Return the sharded state to be filled from a checkpoint.

        Args:
            parts: any of the other names of ``state``; ``model`` is always there. Random states
                belong to ranks: they can only be asked for when as many processes wrote them, and
                FP8 scales when their layout was the same. The guard (skipped steps, window of the
                spikes) is the same on all.
            absent: in names of tensors that the checkpoint lacks, such as ``.expert_bias``: these
                stay as they are.
        """
        ...

    def restore(self, loaded: dict[str, Any], step: int) -> None:
        """Take what a checkpoint filled into ``placeholders``; ``step`` steps have been taken.

        Without the optimizer's part, the optimizer starts afresh from the loaded weights.

        Raises:
            EngineError: parts are left that it does not know.
        """
        ...
