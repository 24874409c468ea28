"""The DeepSpeed engine: ZeRO stages 0 to 3 over the same model, with Megatron's parallel layers.

One step on each rank:

    forward and backward of each micro batch, loss x (data-parallel size / loss tokens of the step)
    DeepSpeed averages gradients over data-parallel ranks, each expert's over its copies
    norm -> finite, no spike? -> clip -> Adam     (else: skipped, engines/step_guard.py)
    expert biases from the counts of all loops; learning rate of the next step

Gradients, and so losses, norms and weights, are those of the Megatron engine: sums over tokens,
divided once by the loss tokens of the global batch. What is saved has the Megatron engine's names
and shapes, optimizer state too, so either engine continues a run of the other, under any ZeRO stage
and any number of ranks.

Source: deepspeed 0.19.8, runtime/engine.py, runtime/zero/, runtime/bf16_optimizer.py.
"""

import io
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext, redirect_stdout
from dataclasses import replace
from itertools import product
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, nested_values
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.distributed.finalize_model_grads import (
    _update_router_expert_bias,
    reset_model_temporary_tensors,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor, nn

from pltmoe.config import RunConfig
from pltmoe.config import deepspeed as settings
from pltmoe.engines.backends import backends
from pltmoe.engines.base import Batch, Capabilities, StepResult
from pltmoe.engines.deepspeed_offload import build_cpu_adam, prepare_disk
from pltmoe.engines.deepspeed_state import KINDS, STATES
from pltmoe.engines.megatron_optimizer import build_schedule
from pltmoe.engines.step_guard import StepGuard
from pltmoe.engines.stepping import SteppingEngine, sum_over_ranks
from pltmoe.errors import ConfigError
from pltmoe.model.first_micro_batch import begin_step
from pltmoe.model.initialize import initialize
from pltmoe.parallel.layout import Layout
from pltmoe.parallel.pipeline import build_stage, forward_micro_batch, sum_loss
from pltmoe.runtime import devices, distributed
from pltmoe.runtime.devices import Backend

if not torch.cuda.is_available():  # else it warns that it found nothing better
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
with redirect_stdout(io.StringIO()):  # it tells which of its kernels cannot be built
    import deepspeed
    from deepspeed.moe.layer import MoE
    from deepspeed.runtime import compiler as their_compiler
    from deepspeed.runtime.config import DeepSpeedConfigError
    from deepspeed.runtime.zero.utils import ZeRORuntimeException
    from deepspeed.utils import groups as their_groups

for handler in logging.getLogger("DeepSpeed").handlers:
    handler.setStream(sys.stderr)  # it took what stdout was at its import

# It would compile shared-memory collectives for a CPU at start-up: gloo does.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

# Its first engine imports Muon, whose decorators load PyTorch's whole compiler: seconds a process.
_compile, their_compiler.compile = their_compiler.compile, lambda *a, **k: lambda function: function
import deepspeed.runtime.zero.muon.original_muon  # noqa: E402  (not used: the optimizer is Adam)

their_compiler.compile = _compile

logger = logging.getLogger(__name__)

_EXPERTS = "experts"
"""Name of the experts' process groups in DeepSpeed's tables."""


class DeepSpeedEngine(SteppingEngine):
    """Takes optimizer steps with DeepSpeed; see ``engines/base.py`` for the protocol."""

    def __init__(self, config: RunConfig, layout: Layout, groups: ProcessGroupCollection):
        """Build model, optimizer and schedule; weights are drawn from ``train.seed``.

        Raises:
            ConfigError: DeepSpeed refuses its JSON, or an optimizer of its own cannot be compiled.
        """
        self.config, self._layout, self._groups = config, layout, groups
        self._device = devices.device()
        self._stage: int = settings.zero_stage(config)
        dtype = devices.parameter_dtype(config.train.precision)
        if self._stage == 0 and dtype == torch.bfloat16:
            raise ConfigError(
                "deepspeed.zero_optimization.stage (0) trains in fp32 only, and train.precision "
                f"({config.train.precision}) means bf16 here: use stage 1"
            )
        impl = devices.transformer_impl(config.train.transformer_impl, dtype)
        kind = "transformer_engine" if impl.choice == "TE" else "local"
        self.model = build_stage(config, layout, groups, dtype, self._device, kind)
        initialize(self.model, config.train.seed)
        self._names = {name: p for name, p in self.model.named_parameters()}
        self._shares_experts = config.model.is_moe and self._stage < 3 and layout.world_size > 1
        self._sum_over_tensor_ranks()
        text = settings.merged(
            config, bf16=dtype == torch.bfloat16, micro_batches=layout.micro_batches
        )
        self._adam = self._build_adam()
        self._decide: Callable[[float], bool] = lambda norm: True
        self._engine = self._initialize(text)
        self._state = STATES[self._stage](self._engine, self._adam, self._names)
        self._state.allocate()
        self._schedule = build_schedule(config, self._adam)
        self._guard = StepGuard(config.train)
        found = backends(config, self.model.config, impl)
        found["optimizer"] = Backend(
            "DeepSpeed", f"ZeRO stage {self._stage}, {type(self._adam).__name__}"
        )
        self.capabilities = Capabilities(
            layout,
            devices.precision_name(config.train.precision),
            found,
            {settings.FILE: json.dumps(text, indent=2) + "\n"},
        )

    def train_step(self, batches: Iterator[Batch], step: int, watch: bool) -> StepResult:
        """Take one optimizer step; see the protocol."""
        self.model.begin_step(watch)
        local = self._forward_backward(batches, forward_only=False)
        loss_sum, tokens = sum_over_ranks(local)
        loss = loss_sum / max(tokens, 1)
        learning_rate = self._adam.param_groups[0]["lr"]
        norms: list[float] = []
        reasons: list[str | None] = []

        def decide(norm: float) -> bool:
            """Say once per step whether it is taken; DeepSpeed asks for each of its groups."""
            if not norms:
                norms.append(norm if math.isfinite(norm) and norm >= 0 else math.nan)
                reasons.append(self._reason_to_skip(loss, norms[0], local))
            return reasons[0] is None

        self._decide = decide
        self._engine.step()
        decide(math.nan)  # where DeepSpeed saw something infinite it does not ask
        reason, norm = reasons[0], norms[0]
        if reason is None:
            if self._expert_biases():
                _update_router_expert_bias([self.model], self.model.config, self._groups.tp_dp_cp)
            self._guard.accept(loss, norm)
        else:
            self._forget_gradients()
            self._skip(step, reason)
        reset_model_temporary_tensors(self.model.config, [self.model])
        return self._finish_step(loss, norm, learning_rate, reason, watch)

    def _run(self, batches: list[dict[str, Tensor]], forward_only: bool) -> Tensor:
        begin_step(self.model)
        counts = torch.stack([batch["loss_mask"].sum() for batch in batches]).sum().double()
        tokens = counts.to(self._device)
        dist.all_reduce(tokens, group=self._groups.dp)
        scale = (self._groups.dp.size() / tokens.clamp(min=1)).float().view(1)
        MoEAuxLossAutoScaler.set_loss_scale(scale)
        self._engine.train(not forward_only)
        reports = []
        try:
            for batch in batches:
                self._engine.set_gradient_accumulation_boundary(len(reports) == len(batches) - 1)
                losses, mask = forward_micro_batch(self.model, self._engine, batch, self._device)
                loss, _, report = sum_loss(mask, losses)
                reports.append(report)
                if not forward_only:
                    self._engine.backward(loss * scale.squeeze(), scale_wrt_gas=False)
        finally:
            self._engine.train()
        if self._groups.tp.rank() > 0:
            return torch.zeros(2, dtype=torch.float64, device=self._device)
        return torch.stack(reports).sum(0)

    # DeepSpeed's engine

    def _forget_gradients(self) -> None:
        """Throw away the sums of a step that is skipped: with offload DeepSpeed adds to them."""
        sums = getattr(self._engine.optimizer, "averaged_gradients", {})
        if 0 < self._stage < 3:
            for group in sums:
                sums[group] = None

    def _build_adam(self) -> torch.optim.Optimizer:
        """Build the optimizer whose update DeepSpeed calls on its partitions."""
        o = self.config.optimizer
        options = {
            "lr": o.lr,
            "betas": (o.beta1, o.beta2),
            "eps": o.eps,
            "weight_decay": o.weight_decay,
        }
        groups = self._parameter_groups()
        device = settings.offload_device(self.config)
        if device == "nvme":
            prepare_disk(self.config)
        if device is None:
            fused = self._device.type == "cuda"
            adam: torch.optim.Optimizer = torch.optim.AdamW(groups, fused=fused, **options)
        else:
            adam = build_cpu_adam(groups, options)
        update = adam.step

        def step_if_decided(*args: Any, **kwargs: Any) -> Any:
            return update(*args, **kwargs) if self._may_update() else None

        adam.step = step_if_decided  # type: ignore[method-assign]
        return adam

    def _parameter_groups(self) -> list[dict[str, Any]]:
        """Part weights by decay (none for norms and biases), and experts from the rest."""
        found: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for name, parameter in self._names.items():
            is_expert = self._shares_experts and ".experts." in name
            if is_expert:
                parameter.allreduce = False  # type: ignore[attr-defined]
                parameter.group_name = _EXPERTS  # type: ignore[attr-defined]
                parameter.model_parallel = True  # type: ignore[attr-defined]  # differs by rank
            decays = parameter.dim() > 1 and not name.endswith(".bias")
            found.setdefault((is_expert, decays), []).append(parameter)
        return [
            {
                "params": parameters,
                "wd_mult": float(decays),
                **({"moe": True, "name": _EXPERTS} if is_expert else {"name": f"dense {decays}"}),
            }
            for (is_expert, decays), parameters in found.items()
        ]

    def _initialize(self, text: dict[str, Any]) -> Any:
        wrapped: nn.Module = _Model(self.model)
        if self._shares_experts:
            wrapped.experts = _ExpertGroups(self.config.model.num_experts or 0, self._groups)
        # It wants torchrun's variable, and does not ask Slurm.
        local_rank = distributed.processes_from_environment().local_rank
        os.environ.setdefault("LOCAL_RANK", str(local_rank))
        chatter = io.StringIO()  # it prints memory before and after each of its groups
        try:
            with redirect_stdout(chatter):
                engine, *_ = deepspeed.initialize(
                    model=wrapped, optimizer=self._adam, config=text, mpu=_Mpu(self._groups)
                )
        except (ValueError, AssertionError, DeepSpeedConfigError, ZeRORuntimeException) as error:
            says = " ".join(str(error).split())
            raise ConfigError(f"deepspeed: DeepSpeed refuses its JSON: {says}") from error
        logger.debug("%s", chatter.getvalue())
        return engine

    def _sum_over_tensor_ranks(self) -> None:
        """Add up the gradients of weights that tensor-parallel ranks hold whole and use in part.

        (Megatron's ``_allreduce_non_tensor_model_parallel_grads``, which needs its own buffers.)
        """
        group, config = self._groups.tp, self.model.config
        if group.size() == 1:
            return

        def summed(gradient: Tensor) -> Tensor:
            total = gradient.clone(memory_format=torch.contiguous_format)
            dist.all_reduce(total, group=group)
            return total

        for name, parameter in self._names.items():
            cut = config.sequence_parallel and getattr(parameter, "sequence_parallel", False)
            if cut or (config.qk_layernorm and ("q_layernorm" in name or "k_layernorm" in name)):
                parameter.register_hook(summed)

    def _may_update(self) -> bool:
        """Ask whether this step is taken, and clip where DeepSpeed does not."""
        if self._stage > 0:
            norm = self._engine.optimizer._global_grad_norm
            return self._decide(float(norm) if norm is not None else math.nan)
        norm = self._norm_of_whole_gradients()
        if not self._decide(norm):
            return False
        limit = self.config.optimizer.clip_grad_norm
        if 0 < limit < norm:
            for parameter in self._names.values():
                parameter.grad.mul_(limit / (norm + 1e-6))
        return True

    def _norm_of_whole_gradients(self) -> float:
        """Return the global norm where every rank has its weights' whole gradients (stage 0)."""
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        for name, parameter in self._names.items():
            square = torch.linalg.vector_norm(parameter.grad, dtype=torch.float64).square()
            total += square / self._copies(name, parameter)
        dist.all_reduce(total)
        return total.sqrt().item()

    def _copies(self, name: str, parameter: nn.Parameter) -> int:
        if self._shares_experts and ".experts." in name:
            return self._groups.expt_dp.size()
        is_cut = getattr(parameter, "tensor_model_parallel", False)
        return self._groups.dp.size() if is_cut else self._layout.world_size

    # What is saved and restored

    def _model_state(self) -> dict[str, Any]:
        with self._state.whole_weights():
            weights = super()._model_state()
            self._by_weight = self._entries(weights)
            if self._stage == 3:
                dict_list_map_inplace(_copied, weights)
        return weights

    def _load_model(self, weights: dict[str, Any]) -> None:
        with self._state.whole_weights(changed=True):
            super()._load_model(weights)

    def _optimizer_state(self, weights: dict[str, Any], loading: bool) -> dict[str, Any]:
        """See the base class; ``weights`` are those that ``_model_state`` returned last."""
        found: dict[str, Any] = {kind: {} for kind in KINDS}
        for number, names in self._state.subgroups().items():
            with nullcontext() if loading else self._state.in_memory(number, changed=False):
                for name, kind in product(names, KINDS):
                    parameter = self._names[name]
                    shape = getattr(parameter, "ds_shape", parameter.shape)
                    value = torch.empty(shape) if loading else self._state.get(name, kind)
                    found[kind][name] = make_sharded_optimizer_tensor(
                        self._by_weight[name], value, f"optimizer.state.{kind}"
                    )
        return found

    def _entries(self, weights: dict[str, Any]) -> dict[str, Any]:
        """Return name -> a weight's entry in the sharded state dict."""
        by_id = {id(parameter): name for name, parameter in self._names.items()}
        sharded, _ = extract_sharded_tensors_and_factories(weights)
        found = {by_id[id(e.data)]: e for e in nested_values(sharded) if id(e.data) in by_id}
        assert found.keys() == self._names.keys(), self._names.keys() - found.keys()
        return found

    def _restore_optimizer(self, loaded: dict[str, Any], updates: int) -> None:
        for number, names in self._state.subgroups().items():
            with self._state.in_memory(number, changed=True):
                for name, kind in product(names, KINDS):
                    self._state.set(name, kind, loaded[kind][name])
        self._state.set_updates(updates)

    def _start_optimizer(self) -> None:
        self._state.start()


class _Model(nn.Module):
    """What DeepSpeed is given: the model, and beside it the mark of its experts."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, *args: Any) -> Tensor:
        return self.model(*args)


class _ExpertGroups(MoE):
    """Makes DeepSpeed treat Megatron's experts as its own: it looks for a module of this class."""

    def __init__(self, num_experts: int, groups: ProcessGroupCollection):
        nn.Module.__init__(self)
        self.num_experts, self._groups = num_experts, groups

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Enter Megatron's groups into DeepSpeed's tables, instead of making new ones."""
        for table, ranks, group in (
            (
                their_groups._EXPERT_PARALLEL_GROUP,
                their_groups._EXPERT_PARALLEL_GROUP_RANKS,
                self._groups.ep,
            ),
            (
                their_groups._EXPERT_DATA_PARALLEL_GROUP,
                their_groups._EXPERT_DATA_PARALLEL_GROUP_RANKS,
                self._groups.expt_dp,
            ),
        ):
            table[_EXPERTS] = group
            ranks[_EXPERTS] = dist.get_process_group_ranks(group)


class _Mpu:
    """Megatron's groups under the names that DeepSpeed asks an ``mpu`` for."""

    def __init__(self, groups: ProcessGroupCollection):
        for name, group in (
            ("data", groups.dp),
            ("model", groups.tp),
            ("tensor_model", groups.tp),
        ):
            setattr(self, f"get_{name}_parallel_group", lambda g=group: g)
            setattr(self, f"get_{name}_parallel_rank", lambda g=group: g.rank())
            setattr(self, f"get_{name}_parallel_world_size", lambda g=group: g.size())
        ranks = dist.get_process_group_ranks(groups.dp)
        self.get_data_parallel_group_ranks = lambda: ranks


def _copied(entry: Any) -> Any:
    """Copy an entry's tensor to host memory: gathered weights are given back."""
    if not isinstance(getattr(entry, "data", None), Tensor):
        return entry
    return replace(entry, data=entry.data.detach().cpu().clone())
