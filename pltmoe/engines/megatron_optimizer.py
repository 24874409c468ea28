"""Megatron's gradient buffers, distributed Adam and learning-rate schedule, from our config.

Weights may be bf16; gradients are accumulated and reduced in fp32, and the optimizer keeps fp32
master weights, split over data-parallel ranks. Experts have their own buffers and shards.
"""

import math

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import ChainedOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import nn

from pltmoe.config import RunConfig

_BUCKET_PARAMETERS = 40_000_000
"""Megatron's default size of a gradient bucket, in parameters."""
_DECAY_STYLES = {"cosine": "cosine", "wsd": "WSD", "linear": "linear", "constant": "constant"}


def wrap_in_ddp(
    model: nn.Module, groups: ProcessGroupCollection, overlap: bool = False
) -> DistributedDataParallel:
    """Give ``model`` fp32 gradient buffers that are reduced once per optimizer step, in buckets.

    With ``overlap``, each as soon as the last micro batch's backward has filled it. Buckets also
    keep a checkpoint cheap: Megatron gathers the optimizer state on the device, one at a time.
    """
    ddp_config = DistributedDataParallelConfig(
        # A float64 model is there to be compared to the last digit.
        grad_reduce_in_fp32=model.config.params_dtype != torch.float64,
        use_distributed_optimizer=True,
        overlap_grad_reduce=overlap,
    )
    layout = DistributedOptimizer.compute_full_param_layout(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        _BUCKET_PARAMETERS,
        groups.dp_cp.size(),
        ddp_config,
        expert_data_parallel_world_size=groups.expt_dp.size(),
    )
    return DistributedDataParallel(
        config=model.config,
        ddp_config=ddp_config,
        module=model,
        pg_collection=groups,
        full_param_layout=layout,
    )


def build_optimizer(
    config: RunConfig,
    ddp: DistributedDataParallel,
    dtype: torch.dtype,
    groups: ProcessGroupCollection,
) -> ChainedOptimizer:
    """Build AdamW; norms and biases have no weight decay.

    The buffers of ``wrap_in_ddp`` leave each rank the sums of its own shard. An optimizer that is
    not cut the same way (Megatron's Lion and Muon) would read what other ranks have not added to.
    """
    o = config.optimizer
    optimizer = get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer="adam",
            lr=o.lr,
            min_lr=o.min_lr,
            weight_decay=o.weight_decay,
            adam_beta1=o.beta1,
            adam_beta2=o.beta2,
            adam_eps=o.eps,
            clip_grad=o.clip_grad_norm,
            bf16=dtype == torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=True,
        ),
        [ddp],
        use_gloo_process_groups=False,
        pg_collection=groups,
    )
    whole = [p for p in optimizer.chained_optimizers if not isinstance(p, DistributedOptimizer)]
    assert not whole, f"{type(whole[0]).__name__} is not cut over ranks, as the gradients are"
    return optimizer


def build_schedule(
    config: RunConfig, optimizer: ChainedOptimizer | torch.optim.Optimizer
) -> OptimizerParamScheduler:
    """Build the schedule, counted in optimizer steps; step k (from 1) uses its value at k - 1.

    Warm-up starts at 0, so with warm-up the first step only fills Adam's moments (as in Megatron).
    WSD decays linearly.
    """
    o = config.optimizer
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=o.lr,
        min_lr=o.min_lr,
        lr_warmup_steps=o.warmup_steps,
        lr_decay_steps=o.decay_steps or config.train.steps,
        lr_decay_style=_DECAY_STYLES[o.schedule],
        start_wd=o.weight_decay,
        end_wd=o.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        wsd_decay_steps=o.wsd_decay_steps,
        lr_wsd_decay_style="linear",
    )


def gradient_norm(optimizer: ChainedOptimizer) -> float:
    """Hand the reduced gradients to the optimizer and return their global norm.

    Megatron's ``optimizer.step()`` would compute the norm and update in one go; here the caller
    can look at it first.
    """
    optimizer.prepare_grads()
    norm = optimizer.get_grad_norm()
    return norm.item() if isinstance(norm, torch.Tensor) else float(norm)


def update(optimizer: ChainedOptimizer, norm: float, limit: float) -> None:
    """Clip gradients of global norm ``norm`` to ``limit`` (0: not at all), and take the step."""
    assert math.isfinite(norm)
    if limit > 0:
        for part in optimizer.chained_optimizers:
            if parameters := part.get_parameters():  # a rank may own no shard of a small model
                clip_grad_by_total_norm_fp32(parameters, limit, norm)
    optimizer.step_with_ready_grads()


def ensure_state(optimizer: ChainedOptimizer) -> None:
    """Allocate Adam's moments, as the first step would: Megatron cannot describe absent ones."""
    for part in optimizer.chained_optimizers:
        adam = part.optimizer
        for parameter in (p for group in adam.param_groups for p in group["params"]):
            if not adam.state[parameter]:
                part.init_state_fn(adam, part.config)
            if isinstance(adam, torch.optim.AdamW):
                adam.state[parameter].setdefault("step", torch.tensor(0.0))
