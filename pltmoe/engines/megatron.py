"""The Megatron-core engine: its DDP, distributed optimizer and forward/backward functions.

One step on each rank:

    zero gradient buffers
    forward and backward of all micro batches      parallel/pipeline.py
    finalize_model_grads: sum over ranks, divide by the tokens of the global batch,
                          update the expert biases from the counts of all loops
    norm -> finite, no spike? -> clip -> AdamW    (else: skipped, engines/step_guard.py)
    learning rate of the next step

The loss is a sum over tokens until it is divided once by the number of loss tokens of the global
batch, so it is the same mean for every layout. Router losses are means over the tokens of a micro
batch, weighted by its loss tokens (model/router.py).
"""

import logging
import math
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from pltmoe.config import RunConfig
from pltmoe.engines import megatron_state
from pltmoe.engines.backends import backends, choose_fp8, weight_gradients
from pltmoe.engines.base import Batch, Capabilities, StepResult
from pltmoe.engines.megatron_optimizer import (
    build_optimizer,
    build_schedule,
    gradient_norm,
    update,
    wrap_in_ddp,
)
from pltmoe.engines.step_guard import StepGuard
from pltmoe.model.initialize import global_name, initialize
from pltmoe.model.loop_diagnostics import diagnostic_metrics
from pltmoe.model.loop_stats import collect_loop_stats, loop_metrics, reset_loop_stats
from pltmoe.parallel.layout import Layout
from pltmoe.parallel.pipeline import Pipeline, build_stage
from pltmoe.runtime import devices, fp8
from pltmoe.runtime.distributed import highest, is_main
from pltmoe.runtime.seeds import restore_random_state

logger = logging.getLogger(__name__)


class MegatronEngine:
    """Takes optimizer steps with Megatron-core; see ``engines/base.py`` for the protocol."""

    def __init__(self, config: RunConfig, layout: Layout, groups: ProcessGroupCollection):
        """Build model, optimizer and schedule; weights are drawn from ``train.seed``."""
        self.config, self._layout, self._groups = config, layout, groups
        self._device = devices.device()
        dtype = devices.parameter_dtype(config.train.precision)
        impl = devices.transformer_impl(config.train.transformer_impl, dtype)
        kind = "transformer_engine" if impl.choice == "TE" else "local"
        gradients = weight_gradients(config, impl, dtype)
        in_fp8, branches = choose_fp8(config, impl, fp8.this_machine())
        self.model = build_stage(config, layout, groups, dtype, self._device, kind, in_fp8)
        initialize(self.model, config.train.seed)
        self._ddp = wrap_in_ddp(self.model, groups, config.parallel.overlap_grad_reduce)
        self._optimizer = build_optimizer(config, self._ddp, dtype, groups)
        self._schedule = build_schedule(config, self._optimizer)
        self._guard = StepGuard(config.train)
        length = config.data.sequence_length
        self.pipeline = Pipeline(self.model, self._ddp, layout, groups, length, self._device)
        found = backends(config, self.model.config, impl)
        found |= branches | {"weight gradients": gradients}
        found["optimizer"] = devices.optimizer_backend()
        precision = devices.precision_name(config.train.precision)
        self.capabilities = Capabilities(layout, precision, found)

    def train_step(self, batches: Iterator[Batch], step: int, watch: bool) -> StepResult:
        """Take one optimizer step; see the protocol."""
        self._ddp.zero_grad_buffer()
        self._optimizer.zero_grad()
        self.model.diagnostics.begin_step(watch)
        biases = self._expert_biases()
        before = [bias.clone() for bias in biases]
        local = self._forward_backward(batches, forward_only=False)
        loss_sum, tokens = self._sum_over_ranks(local)
        loss = loss_sum / max(tokens, 1)
        norm = gradient_norm(self._optimizer) if math.isfinite(loss_sum) else math.nan
        learning_rate = self._optimizer.param_groups[0]["lr"]
        reason = self._reason_to_skip(loss, norm, local)
        if reason is None:
            update(self._optimizer, norm, self.config.optimizer.clip_grad_norm)
            self._guard.accept(loss, norm)
        else:
            for bias, value in zip(biases, before, strict=True):
                bias.copy_(value)  # finalize_model_grads has moved them already
            self._skip(step, reason)
        self._schedule.step(1)
        metrics = self._model_metrics() if watch else {}
        reset_loop_stats(self.model.layers)
        return StepResult(
            loss, norm, float(learning_rate), metrics, self._guard.skipped, reason is not None
        )

    def eval_step(self, batches: Iterator[Batch]) -> tuple[float, int]:
        """Return summed loss and loss tokens of one global batch; see the protocol."""
        with torch.no_grad():
            local = self._forward_backward(batches, forward_only=True)
        loss_sum, tokens = self._sum_over_ranks(local)
        return loss_sum, int(tokens)

    def state(self) -> dict[str, Any]:
        """Return the sharded state to save; see the protocol."""
        weights = megatron_state.model_state(self.model, self._groups)
        return {
            "model": weights,
            "optimizer": megatron_state.optimizer_state(
                self._optimizer, weights, self._groups, loading=False
            ),
            "random": megatron_state.random_object(loading=False),
            "guard": megatron_state.guard_object(self._guard.state()),
        }

    def placeholders(self, *parts: str, expert_bias: bool = True) -> dict[str, Any]:
        """Return the sharded state to be filled; see the protocol."""
        weights = megatron_state.model_state(self.model, self._groups)
        if not expert_bias:
            weights = {k: v for k, v in weights.items() if not k.endswith(".expert_bias")}
        wanted: dict[str, Any] = {"model": weights}
        if "optimizer" in parts:
            wanted["optimizer"] = megatron_state.optimizer_state(
                self._optimizer, weights, self._groups, loading=True
            )
        if "random" in parts:
            wanted["random"] = megatron_state.random_object(loading=True)
        if "guard" in parts:
            wanted["guard"] = megatron_state.guard_object(None)
        return wanted

    def restore(self, loaded: dict[str, Any], step: int) -> None:
        """Take what was loaded; see the protocol."""
        missing = self.model.load_state_dict(loaded["model"], strict=False)
        strange = [key for key in missing.missing_keys if "expert_bias" not in key]
        strange = [key for key in strange if not key.endswith("_extra_state")]
        assert not strange and not missing.unexpected_keys, (strange, missing.unexpected_keys)
        if "guard" in loaded:
            self._guard.restore(loaded["guard"])
        if "optimizer" in loaded:
            updates = step - self._guard.skipped  # Adam counts the steps that were taken
            megatron_state.restore_optimizer(self._optimizer, loaded["optimizer"], updates)
        else:
            self._optimizer.reload_model_params()
        if "random" in loaded:
            restore_random_state(loaded["random"])
        self._schedule.num_steps = step
        self._schedule.step(0)

    def _forward_backward(self, batches: Iterator[Batch], forward_only: bool) -> Tensor:
        """Run this rank's micro batches; returns [summed loss, loss tokens] in float64."""
        step = [dict(batch) for batch in islice(batches, self._layout.micro_batches)]
        return self.pipeline.run(step, forward_only)

    def _sum_over_ranks(self, local: Tensor) -> tuple[float, float]:
        """Every rank learns the sums, also those that hold no head."""
        total = local.clone()
        dist.all_reduce(total)
        loss_sum, tokens = total.tolist()
        return loss_sum, tokens

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

    def _expert_biases(self) -> list[Tensor]:
        return [b for name, b in self.model.named_buffers() if name.endswith("expert_bias")]

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

    def _skip(self, step: int, reason: str) -> None:
        """Count and tell; raises EngineError after too many in a row."""
        self._guard.skip(step, reason)
        if is_main():
            logger.warning(
                "step %d is skipped, nothing is updated (%d in a row, %d in all): %s",
                step,
                self._guard.in_a_row,
                self._guard.skipped,
                reason,
            )

    def _not_finite_gradient(self) -> str:
        """Name the first broken gradients; each rank knows its own shard of the sums."""
        names = [
            global_name(self.model, name)
            for name, parameter in self.model.named_parameters()
            if not torch.isfinite(parameter.main_grad).all()
        ]
        per_rank: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(per_rank, names[:3])
        found = list(dict.fromkeys(name for names in per_rank for name in names))
        return (
            "the gradient norm is not finite (the loss is, on every rank); broken gradients: "
            + (", ".join(found[:3]) or "only their sum overflows")
        )


def _not_finite_loss(local: Tensor) -> str:
    """Say which ranks' micro batches had a loss that is not finite; all ranks call it."""
    per_rank: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(per_rank, local[0].item())
    broken = [
        f"rank {rank}: {loss}" for rank, loss in enumerate(per_rank) if not math.isfinite(loss)
    ]
    return f"the loss is not finite ({', '.join(broken) or 'only their sum overflows'})"
