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

import math
from collections.abc import Iterator
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
from pltmoe.engines.stepping import SteppingEngine, sum_over_ranks
from pltmoe.model.initialize import global_name, initialize
from pltmoe.parallel.layout import Layout
from pltmoe.parallel.pipeline import Pipeline, build_stage
from pltmoe.runtime import devices, fp8


class MegatronEngine(SteppingEngine):
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
        self.model.begin_step(watch)
        biases = self._expert_biases()
        before = [bias.clone() for bias in biases]
        local = self._forward_backward(batches, forward_only=False)
        loss_sum, tokens = sum_over_ranks(local)
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
        return self._finish_step(loss, norm, learning_rate, reason, watch)

    def _run(self, batches: list[dict[str, Tensor]], forward_only: bool) -> Tensor:
        return self.pipeline.run(batches, forward_only)

    def _optimizer_state(self, weights: dict[str, Any], loading: bool) -> dict[int, Any]:
        return megatron_state.optimizer_state(self._optimizer, weights, self._groups, loading)

    def _restore_optimizer(self, loaded: dict[int, Any], updates: int) -> None:
        megatron_state.restore_optimizer(self._optimizer, loaded, updates)
        # In fp32 a rank's masters are its shard of the weights: others' are in the checkpoint too,
        # but rounded where that is of a bf16 run.
        self._ddp.start_param_sync()

    def _start_optimizer(self) -> None:
        self._optimizer.reload_model_params()

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
