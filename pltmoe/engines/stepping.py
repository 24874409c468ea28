"""What an optimizer step is around the optimizer, alike for both engines.

An engine says how gradients come about and how they are applied; here stand the decision to skip,
the metrics, and what is saved and restored besides the optimizer's state.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from pltmoe.config import RunConfig
from pltmoe.engines import sharded_state
from pltmoe.engines.base import Batch, Capabilities, StepResult
from pltmoe.engines.step_guard import StepGuard
from pltmoe.errors import DataError, EngineError
from pltmoe.model.fp8_scales import (
    forget_what_was_not_trained,
    fp8_scales,
    restore_fp8_scales,
)
from pltmoe.model.loop_diagnostics import diagnostic_metrics
from pltmoe.model.loop_stats import collect_loop_stats, loop_metrics
from pltmoe.model.plt import PLTModel
from pltmoe.parallel.layout import Layout
from pltmoe.runtime.distributed import highest, is_main
from pltmoe.runtime.seeds import random_state, restore_random_state

logger = logging.getLogger(__name__)


class SteppingEngine:
    """The half of an engine that both engines share; see ``engines/base.py`` for the protocol."""

    config: RunConfig
    capabilities: Capabilities
    model: PLTModel
    _layout: Layout
    _groups: ProcessGroupCollection
    _guard: StepGuard
    _schedule: OptimizerParamScheduler

    def _run(self, batches: list[dict[str, Tensor]], forward_only: bool) -> Tensor:
        """Run this rank's micro batches; returns [summed loss, loss tokens] in float64."""
        raise NotImplementedError

    def _optimizer_state(self, weights: dict[str, Any], loading: bool) -> Any:
        """Describe the optimizer's state; collective when saving."""
        raise NotImplementedError

    def _restore_optimizer(self, loaded: Any, updates: int) -> None:
        """Take the optimizer's state after ``updates`` updates."""
        raise NotImplementedError

    def _start_optimizer(self) -> None:
        """Let the optimizer start from the model's weights."""
        raise NotImplementedError

    def _model_state(self) -> dict[str, Any]:
        return sharded_state.model_state(self.model, self._groups)

    def _load_model(self, weights: dict[str, Any]) -> None:
        missing = self.model.load_state_dict(weights, strict=False)
        may_lack = (".expert_bias", ".plt_gate.", "_extra_state")  # see checkpoint/compatible.py
        strange = [key for key in missing.missing_keys if not any(part in key for part in may_lack)]
        assert not strange and not missing.unexpected_keys, (strange, missing.unexpected_keys)

    def _forward_backward(self, batches: Iterator[Batch], forward_only: bool) -> Tensor:
        wanted = self._layout.micro_batches
        step = [dict(batch) for batch in islice(batches, wanted)]
        if len(step) < wanted:  # a step of fewer would be taken without a word
            raise DataError(
                f"the data end inside a step: {len(step)} of its {wanted} micro batches"
            )
        return self._run(step, forward_only)

    def eval_step(self, batches: Iterator[Batch]) -> tuple[float, int]:
        """Return summed loss and loss tokens of one global batch; see the protocol."""
        with torch.no_grad():
            local = self._forward_backward(batches, forward_only=True)
        if self.config.train.keeps_fp8_scales:
            forget_what_was_not_trained(self.model)
        loss_sum, tokens = sum_over_ranks(local)
        return loss_sum, int(tokens)

    def state(self) -> dict[str, Any]:
        """Return the sharded state to save; see the protocol."""
        weights = self._model_state()
        state = {
            "model": weights,
            "optimizer": self._optimizer_state(weights, loading=False),
            "random": sharded_state.rank_object("random", random_state()),
            "guard": sharded_state.guard_object(self._guard.state()),
        }
        if self.config.train.keeps_fp8_scales:
            scales = fp8_scales(self.model)
            state["fp8_scales"] = sharded_state.rank_object("fp8_scales", scales)
        return state

    def placeholders(self, *parts: str, absent: Sequence[str] = ()) -> dict[str, Any]:
        """Return the sharded state to be filled; see the protocol."""
        weights = self._model_state()
        weights = {k: v for k, v in weights.items() if not any(part in k for part in absent)}
        wanted: dict[str, Any] = {"model": weights}
        if "optimizer" in parts:
            wanted["optimizer"] = self._optimizer_state(weights, loading=True)
        for name in ("random", "fp8_scales"):
            if name in parts:
                wanted[name] = sharded_state.rank_object(name, None)
        if "guard" in parts:
            wanted["guard"] = sharded_state.guard_object(None)
        return wanted

    def restore(self, loaded: dict[str, Any], step: int) -> None:
        """Take what was loaded; see the protocol."""
        self._load_model(loaded.pop("model"))
        if "guard" in loaded:
            self._guard.restore(loaded.pop("guard"))
        if "optimizer" in loaded:
            # Adam counts the steps that were taken.
            self._restore_optimizer(loaded.pop("optimizer"), step - self._guard.skipped)
        else:
            self._start_optimizer()
        if "random" in loaded:
            restore_random_state(loaded.pop("random"))
        if "fp8_scales" in loaded:
            restore_fp8_scales(self.model, loaded.pop("fp8_scales"))
        if loaded:
            raise EngineError(
                f"restore() of the engine leaves {', '.join(loaded)} of the checkpoint, which "
                "would begin anew: let it take what placeholders() asks for"
            )
        self._schedule.num_steps = step
        self._schedule.step(0)

    def _finish_step(
        self, loss: float, norm: float, learning_rate: float, reason: str | None, watch: bool
    ) -> StepResult:
        """Move on to the next step's learning rate and statistics; say what this step did."""
        self._schedule.step(1)
        metrics = self._model_metrics() if watch else {}
        return StepResult(
            loss, norm, float(learning_rate), metrics, self._guard.skipped, reason is not None
        )

    def _expert_biases(self) -> list[Tensor]:
        return [b for name, b in self.model.named_buffers() if name.endswith("expert_bias")]

    def _model_metrics(self) -> dict[str, float]:
        """Sum the layers' statistics over all ranks, in one message, and name them."""
        stats = collect_loop_stats(
            self.model.layers, self.model.layers.numbers, self.config.model.num_layers
        )
        stats |= self.model.diagnostics.collect()
        if not stats:
            return {}
        packed = torch.cat([tensor.flatten() for tensor in stats.values()])
        dist.all_reduce(packed)
        sizes = [tensor.numel() for tensor in stats.values()]
        pieces = packed.split(sizes)
        summed = {n: p.view_as(t) for (n, t), p in zip(stats.items(), pieces, strict=True)}
        return loop_metrics(summed) | diagnostic_metrics(summed)

    def _reason_to_skip(self, loss: float, norm: float, local: Tensor) -> str | None:
        """Say why this step must not be taken; the same decision on all ranks, which all ask.

        Loss and norm are sums over all ranks, so what is not finite is so everywhere. Whether a
        sum has the same last bit everywhere is for the network's library to know, so ranks that
        compare numbers agree on the outcome.
        """
        if not math.isfinite(loss):
            return _not_finite_loss(local)
        if not math.isfinite(norm):
            return self._not_finite_gradient()
        if not self._guard.looks_for_spikes:
            return None
        reason = self._guard.spike(loss, norm)
        if highest(float(reason is not None)):
            return reason or "another rank saw a spike"
        return None

    def _not_finite_gradient(self) -> str:
        return "the gradient norm is not finite (the loss is, on every rank)"

    def _skip(self, step: int, reason: str) -> None:
        """Count and tell; raises EngineError after too many in a row."""
        if self.config.train.keeps_fp8_scales:
            forget_what_was_not_trained(self.model)
        self._guard.skip(step, reason)
        if is_main():
            logger.warning(
                "step %d is skipped, nothing is updated (%d in a row, %d in all): %s",
                step,
                self._guard.in_a_row,
                self._guard.skipped,
                reason,
            )


def sum_over_ranks(local: Tensor) -> tuple[float, float]:
    """Return summed loss and loss tokens of all ranks, also to those that hold no head."""
    total = local.clone()
    dist.all_reduce(total)
    loss_sum, tokens = total.tolist()
    return loss_sum, tokens


def _not_finite_loss(local: Tensor) -> str:
    """Say which ranks' micro batches had a loss that is not finite; all ranks call it."""
    per_rank: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(per_rank, local[0].item())
    broken = [
        f"rank {rank}: {loss}" for rank, loss in enumerate(per_rank) if not math.isfinite(loss)
    ]
    more = f" and {len(broken) - 8} more ranks" if len(broken) > 8 else ""
    return f"the loss is not finite ({', '.join(broken[:8]) or 'only their sum overflows'}{more})"
