"""The planner's parameter, gradient and optimizer bytes are what a real engine allocates."""

import pytest

from pltmoe.parallel.layout import layout_for
from pltmoe.plan.weights import stage_weights, weight_bytes
from tests.distributed.tiny import DENSE, MOE, tiny_config

pytestmark = [pytest.mark.distributed, pytest.mark.xdist_group("ranks")]

# Large enough that the padding of Megatron's buffers does not show.
WIDE = {"hidden_size": 128, "vocab_size": 512, "num_layers": 4, "head_dim": 32}
WIDE_MOE = MOE | WIDE | {"moe_ffn_hidden_size": 64, "num_experts": 8}
WIDE_DENSE = DENSE | WIDE | {"ffn_hidden_size": 192}
CASES = {
    "dense-fp32": (1, WIDE_DENSE, {"train__precision": "fp32"}),
    "moe-bf16": (1, WIDE_MOE, {"train__precision": "bf16"}),
    "moe-tied": (1, WIDE_MOE | {"tied_embeddings": True}, {"train__precision": "bf16"}),
    "moe-hidden-gate": (1, WIDE_MOE | {"gate_use_hidden_states": True}, {}),
    "dense-dp2": (2, WIDE_DENSE, {"train__precision": "bf16"}),
    "moe-ep2": (2, WIDE_MOE, {"parallel__expert_parallel_size": 2, "train__precision": "bf16"}),
    "moe-cp2": (2, WIDE_MOE, {"parallel__context_parallel_size": 2}),
    "dense-tp2": (2, WIDE_DENSE, {"parallel__tensor_parallel_size": 2}),
    "moe-tp2-etp2": (
        2,
        WIDE_MOE,
        {"parallel__tensor_parallel_size": 2, "parallel__expert_tensor_parallel_size": 2},
    ),
    "moe-pp2": (2, WIDE_MOE, {"parallel__pipeline_parallel_size": 2, "train__precision": "bf16"}),
    "dense-pp2-tied": (
        2,
        WIDE_DENSE | {"tied_embeddings": True},
        {"parallel__pipeline_parallel_size": 2},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_bytes_of_an_engine(warm_ranks, case):
    ranks, model, changes = CASES[case]
    layout = layout_for(tiny_config(model, **changes), ranks)
    element = 2 if changes.get("train__precision") == "bf16" else 4  # on a CPU, auto is fp32
    held = warm_ranks(ranks, "tests.distributed.plan_cases:held_bytes", model=model, **changes)
    for rank in held:
        weights = stage_weights(tiny_config(model, **changes).model, layout, rank["stage"])
        planned = weight_bytes(weights, layout, element)
        assert weights.largest == rank["largest"]
        assert planned.parameters == rank["parameters"]
        assert planned.gradients == pytest.approx(rank["gradients"], rel=0.05)
        # The shards of one buffer are even, but its parameters are not, so ranks differ a little.
    optimizer = sum(rank["optimizer"] for rank in held) / ranks
    expected = sum(
        weight_bytes(stage_weights(tiny_config(model).model, layout, r["stage"]), layout, element)
        .optimizer
        for r in held
    )  # fmt: skip
    assert expected / ranks == pytest.approx(optimizer, rel=0.05)
