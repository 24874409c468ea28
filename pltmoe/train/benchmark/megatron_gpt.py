"""Megatron-core's own GPT model with experts, trained as Megatron trains it: what we compare with.

The model is ``GPTModel`` from Megatron-core's local layer spec, or from its Transformer Engine spec
where our engine uses that, in the same data-parallel wrapper, with the same distributed optimizer
and the same schedule of micro batches as our engine, on the same layout. Weights are copied from
our model, so both have the same losses: that is checked. Statistics of its routers are not taken,
as ours are not. What it would not do as ours does, configs.py refuses.
"""

from collections.abc import Container, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_logging import MoEMetricsTracker, set_moe_metrics_tracker
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from pltmoe.config import ModelConfig, RunConfig
from pltmoe.engines.backends import choose_fp8
from pltmoe.engines.base import Batch
from pltmoe.engines.megatron_optimizer import build_optimizer, build_schedule, wrap_in_ddp
from pltmoe.parallel.layout import Layout
from pltmoe.parallel.pipeline import describe_layers
from pltmoe.runtime import devices, fp8


class MegatronGPT:
    """Takes optimizer steps with Megatron-core alone."""

    def __init__(
        self,
        config: RunConfig,
        layout: Layout,
        groups: ProcessGroupCollection,
        attention: type[torch.nn.Module] | None = None,
    ):
        """Build the model of ``config``, which must have one loop, with its own random weights.

        Args:
            config: the run.
            layout: sizes.
            groups: process groups.
            attention: put this in the place of Megatron's core attention.
        """
        self._config, self._layout, self._groups = config, layout, groups
        self._device, model = devices.device(), config.model
        set_moe_metrics_tracker(_NoStatistics())
        assert model.num_loops == 1, "Megatron-core has no loops"
        dtype = devices.parameter_dtype(config.train.precision)
        impl = devices.transformer_impl(config.train.transformer_impl, dtype)
        is_te = impl.choice == "TE"
        in_fp8, _ = choose_fp8(config, impl, fp8.this_machine())
        kind = "transformer_engine" if is_te else "local"
        transformer = describe_layers(config, dtype, kind, in_fp8)
        spec = gpt_layer_spec(model, is_te)
        if attention is not None:
            spec.submodules.self_attention.submodules.core_attention = attention
        self.model = GPTModel(
            transformer,
            spec,
            vocab_size=model.vocab_size,
            max_sequence_length=config.data.sequence_length,
            share_embeddings_and_output_weights=model.tied_embeddings,
            position_embedding_type="rope",
            rotary_base=int(model.rope_theta),
            pg_collection=groups,
        )
        self._ddp = wrap_in_ddp(self.model, groups, config.parallel.overlap_grad_reduce)
        self._optimizer = build_optimizer(config, self._ddp, dtype, groups)
        self._schedule = build_schedule(config, self._optimizer)
        transformer.finalize_model_grads_func = finalize_model_grads
        transformer.no_sync_func = self._ddp.no_sync
        transformer.grad_scale_func = None

    def copy_weights(self, ours: torch.nn.Module) -> None:
        """Take the weights of a ``PLTModel`` of one loop."""
        load_gpt(self.model, ours)
        self._optimizer.reload_model_params()

    def train_step(self, batches: Iterator[Batch]) -> float:
        """Take a step as Megatron-LM's training loop does; returns the mean loss."""
        self._ddp.zero_grad_buffer()
        self._optimizer.zero_grad()
        reports = get_forward_backward_func()(
            forward_step_func=self._forward_step,
            data_iterator=batches,
            model=self._ddp,
            num_microbatches=self._layout.micro_batches,
            seq_length=self._config.data.sequence_length,
            micro_batch_size=self._layout.micro_batch_size,
            forward_only=False,
            pg_collection=self._groups,
        )
        self._optimizer.step()
        self._schedule.step(1)
        loss_sum, tokens = torch.stack(reports).sum(0).tolist()
        return loss_sum / tokens

    def _forward_step(self, batches: Iterator[Batch], model: Any) -> tuple[Tensor, Any]:
        batch = {n: t.to(self._device, non_blocking=True) for n, t in next(batches).items()}
        losses = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
        return losses, partial(_sum_loss, batch["loss_mask"])


class _NoStatistics(MoEMetricsTracker):
    def record(self, *args: Any, **kwargs: Any) -> None:
        """Take none."""


def _sum_loss(mask_bs: Tensor, losses_bs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    total, tokens = (losses_bs.float() * mask_bs).sum(), mask_bs.sum()
    return total, tokens.int(), torch.stack([total.detach(), tokens])


def gpt_layer_spec(model: ModelConfig, is_te: bool) -> ModuleSpec:
    """Return Megatron-core's own layer spec for a model of one loop."""
    if not is_te:
        return get_gpt_layer_local_spec(
            num_experts=model.num_experts, qk_layernorm=model.qk_norm, normalization="RMSNorm"
        )
    return get_gpt_layer_with_transformer_engine_spec(
        num_experts=model.num_experts,
        moe_grouped_gemm=model.is_moe,
        qk_layernorm=model.qk_norm,
    )


def load_gpt(gpt: GPTModel, ours: torch.nn.Module) -> None:
    """Copy the weights of a ``PLTModel`` of one loop into Megatron's model."""
    theirs = gpt.state_dict()
    state = {_name(name, theirs): x for name, x in ours.state_dict().items() if x is not None}
    state = {name: x for name, x in state.items() if "_extra_state" not in name}
    found = gpt.load_state_dict(state, strict=False)
    missing = [name for name in found.missing_keys if "_extra_state" not in name]
    assert not missing and not found.unexpected_keys, (missing, found.unexpected_keys)


def _name(ours: str, theirs: Container[str]) -> str:
    """Return what Megatron's GPTModel calls a tensor of ours.

    Its Transformer Engine spec fuses norms into the linear layers behind them.
    """
    if not ours.startswith("layers."):
        return ours.replace("final_norm.", "decoder.final_layernorm.")
    name = f"decoder.{ours}"
    fused = {
        "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
        "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
    }
    for norm, inside in fused.items():
        if name.endswith(norm) and name not in theirs:
            return name.removesuffix(norm) + inside
    return name
