"""The planner's activation bytes are what the real model keeps."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from pltmoe.config import ModelConfig, model_from_dict
from pltmoe.config.run import ParallelConfig
from pltmoe.model import sdpa
from pltmoe.parallel.layout import layout_for
from pltmoe.plan import activations
from pltmoe.plan.planner import _stage_memory
from pltmoe.plan.weights import stage_weights
from tests.configs import CLP, PLT2, SHARED_KV
from tests.distributed.tiny import tiny_config
from tests.unit.plan.live_memory import LiveMemory

BASE = {
    "vocab_size": 160,
    "num_layers": 2,
    "hidden_size": 48,
    "num_attention_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 16,
}
DENSE = BASE | {"ffn_hidden_size": 96}
MOE = BASE | {
    "num_experts": 8,
    "moe_top_k": 2,
    "moe_ffn_hidden_size": 40,
    "moe_aux_loss_coeff": 0.01,
    "moe_z_loss_coeff": 0.001,
}
PLT = PLT2 | {"window_keys": 16}
CASES = {
    "dense": (DENSE, 2, 80),
    "dense-mha-plain": (DENSE | {"num_kv_heads": 4, "qk_norm": False}, 1, 128),
    "dense-tied-loop3": (DENSE | {"num_loops": 3, "tied_embeddings": True}, 2, 64),
    "dense-plt2": (DENSE | PLT, 2, 128),
    "dense-plt3-norm": (DENSE | PLT | {"num_loops": 3, "normalize_per_loop": True}, 1, 192),
    "dense-plt2-mha": (DENSE | PLT | {"num_kv_heads": 4}, 2, 100),
    "dense-short": (DENSE | PLT | {"window_keys": 64}, 3, 48),
    "moe": (MOE, 2, 128),
    "moe-many-experts": (MOE | {"num_experts": 64, "moe_ffn_hidden_size": 8}, 1, 128),
    "moe-clp": (MOE | CLP, 1, 96),
    "moe-shared-kv": (MOE | SHARED_KV, 2, 96),
    "moe-plt2": (MOE | PLT, 3, 128),
    "moe-plt3": (MOE | PLT | {"num_loops": 3}, 1, 256),
    "moe-plt3-shared-routing": (
        MOE | PLT | {"num_loops": 3, "num_experts": 64, "moe_loop_routing": "shared"},
        1,
        128,
    ),
    "moe-gate-hidden": (MOE | PLT | {"gate_use_hidden_states": True}, 1, 128),
}


def measured(
    m: ModelConfig,
    b: int,
    s: int,
    dtype: torch.dtype,
    recompute: Any,
    groups: Any,
    backward: bool = False,
):
    """Return the bytes that one forward pass leaves alive; with ``backward`` also after that."""
    from pltmoe.model.initialize import initialize
    from pltmoe.model.megatron_config import transformer_config
    from pltmoe.model.plt import PLTModel

    parallel = ParallelConfig(recompute=recompute)
    model = PLTModel(m, transformer_config(m, params_dtype=dtype, parallel=parallel), groups)
    initialize(model, seed=1)
    tokens = torch.randint(m.vocab_size, (b, s))
    model.train()
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    own = [*model.parameters(), *(w.grad for w in model.parameters()), *model.buffers(), tokens]
    with LiveMemory(own, watch=backward) as memory:
        losses = model(tokens, None, tokens, torch.tensor(float(b * s)))
        kept = memory.alive() if losses.requires_grad else 0
        if not backward:
            return kept
        losses.sum().backward()
        del losses
        return kept, memory.most, memory.alive()


def planned(
    m: ModelConfig,
    b: int,
    s: int,
    element: int,
    recompute: str,
    kernels: activations.Kernels = activations.CPU,
) -> float:
    """Return the same from the formulas."""
    z = activations.Sizes(m=m, s=s, b=b, r=s * b, tp=1, cp=1, etp=1, e=element, kernels=kernels)
    loops = range(1, m.num_loops + 1)
    layers = sum(activations.kept_by_layer(z, loop, recompute) for loop in loops)
    between = (m.num_loops - 1) * activations.between_loops_bytes(z)
    return m.num_layers * layers + between + activations.head_bytes(z)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_activation_bytes_are_what_the_model_keeps(groups, case, dtype, recompute):
    tree, b, s = CASES[case]
    m = model_from_dict(tree)
    real = measured(m, b, s, dtype, recompute, groups)
    assert planned(m, b, s, dtype.itemsize, recompute) == pytest.approx(real, rel=0.05)


class Whole(torch.autograd.Function):
    """A window as Transformer Engine's kernels take it: they keep their arguments and results."""

    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, v: Any) -> Any:
        b, h, s, size = q.shape
        out = q.new_zeros(s, b, h, size).permute(1, 2, 0, 3)
        ctx.save_for_backward(q, k, v, out, q.new_zeros(b, h, s, dtype=torch.float32))
        return out


def with_repeated_heads(q: Any, k: Any, v: Any, **how: Any) -> Any:
    """Attend as model/sdpa.py does on a GPU, with the fused kernel of a CPU."""
    if "attn_mask" in how:
        k, v = (x.repeat_interleave(q.size(1) // k.size(1), 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=k.size(1) != q.size(1), **how)


@pytest.mark.parametrize(
    ("kv_heads", "kernels", "name", "function"),
    [
        (2, activations.CUDA, "attend_fused", with_repeated_heads),
        (8, activations.TE, "window_attention", lambda q, k, v, _: Whole.apply(q, k, v)),
    ],
)
def test_windows_on_a_gpu(groups, monkeypatch, kv_heads, kernels, name, function):
    m = model_from_dict(DENSE | PLT | {"num_attention_heads": 8, "num_kv_heads": kv_heads})
    kernels = replace(kernels, fused_norm=False)
    monkeypatch.setattr(sdpa, name, function)
    real = measured(m, 1, 512, torch.bfloat16, "none", groups)
    assert planned(m, 1, 512, 2, "none", kernels) == pytest.approx(real, rel=0.03)
    assert planned(m, 1, 512, 2, "none") != pytest.approx(real, rel=0.04), "it is seen"


WIDE = {"num_layers": 4, "hidden_size": 128, "head_dim": 32, "num_kv_heads": 4}
PASSES = {
    "dense-plt2": DENSE | PLT | WIDE | {"ffn_hidden_size": 512},
    "moe": MOE | WIDE | {"moe_ffn_hidden_size": 64},
    "moe-plt3": MOE | PLT | WIDE | {"moe_ffn_hidden_size": 64, "num_loops": 3},
}


@pytest.mark.parametrize("slots", [64, 512])
@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("case", PASSES)
def test_the_worst_moment_of_a_pass_is_planned(groups, case, recompute, slots):
    """Backward, too: it needs no more than is planned; what it has repeated is gone after it.

    Few slots: a looped model's gradients that wait for loop 1 weigh more than what is kept.
    """
    config = tiny_config(
        PASSES[case],
        data__sequence_length=slots,
        train__global_batch_size=1,
        train__micro_batch_size=1,
        parallel__recompute=recompute,
    )
    m = config.model
    layout = layout_for(config, 1)
    z = activations.sizes_for(config, layout, 2, kernels=activations.CPU)
    plan = _stage_memory(config, layout, z, 0, stage_weights(m, layout, 0))
    kept, most, left = measured(m, 1, slots, torch.bfloat16, recompute, groups, backward=True)
    assert left < 0.05 * kept
    # What a layer's backward pass needs on top is an estimate.
    assert 0.6 < most / (plan.activations + plan.working) < 1.05
