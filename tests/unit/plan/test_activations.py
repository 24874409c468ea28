"""The planner's activation bytes are what the real model keeps."""

from typing import Any

import pytest
import torch

from pltmoe.config import ModelConfig, model_from_dict
from pltmoe.config.run import ParallelConfig
from pltmoe.plan import activations
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
LOOP = {"num_loops": 2}
CLP = LOOP | {"cross_loop_shift": True}
SHARED = CLP | {"share_first_loop_kv": True}
PLT = SHARED | {"gated_swa": True, "window_keys": 16}
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
    "moe-shared-kv": (MOE | SHARED, 2, 96),
    "moe-plt2": (MOE | PLT, 3, 128),
    "moe-plt3": (MOE | PLT | {"num_loops": 3}, 1, 256),
    "moe-plt3-shared-routing": (
        MOE | PLT | {"num_loops": 3, "num_experts": 64, "moe_loop_routing": "shared"},
        1,
        128,
    ),
    "moe-gate-hidden": (MOE | PLT | {"gate_use_hidden_states": True}, 1, 128),
}


def measured(m: ModelConfig, b: int, s: int, dtype: torch.dtype, recompute: Any, groups: Any):
    """Return the bytes that one forward pass leaves alive."""
    from pltmoe.model.initialize import initialize
    from pltmoe.model.megatron_config import transformer_config
    from pltmoe.model.plt import PLTModel

    parallel = ParallelConfig(recompute=recompute)
    model = PLTModel(m, transformer_config(m, params_dtype=dtype, parallel=parallel), groups)
    initialize(model, seed=1)
    tokens = torch.randint(m.vocab_size, (b, s))
    model.train()
    own = [*model.parameters(), *model.buffers(), tokens]
    with LiveMemory(own) as memory:
        losses = model(tokens, None, tokens, torch.tensor(float(b * s)))
        return memory.alive() if losses.requires_grad else 0


def planned(m: ModelConfig, b: int, s: int, element: int, recompute: str) -> float:
    """Return the same from the formulas."""
    z = activations.Sizes(
        m=m, s=s, b=b, r=s * b, tp=1, cp=1, etp=1, e=element, kernels=activations.CPU
    )
    loops = range(1, m.num_loops + 1)
    layers = sum(activations.kept_by_layer(z, loop, recompute) for loop in loops)
    layers += activations.left_by_layer(z, recompute)
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


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_what_shared_routing_saves_is_what_the_model_saves(groups, recompute):
    """Little, so that the comparison of the whole would not see it."""
    tree, b, s = CASES["moe-plt3-shared-routing"]
    shared = model_from_dict(tree)
    independent = shared.model_copy(update={"moe_loop_routing": "independent"})
    real = [measured(m, b, s, torch.float32, recompute, groups) for m in (independent, shared)]
    plan = [planned(m, b, s, 4, recompute) for m in (independent, shared)]
    assert plan[0] - plan[1] == pytest.approx(real[0] - real[1], rel=0.05)
    assert plan[1] < plan[0]
