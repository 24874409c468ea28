"""The planner's bytes are what a real engine allocates: weights, optimizer, activations."""

from dataclasses import replace

import pytest

from pltmoe.parallel.layout import layout_for
from pltmoe.plan.activations import CPU, sizes_for
from pltmoe.plan.planner import _stage_memory
from pltmoe.plan.weights import stage_weights, weight_bytes, zero_bytes
from tests.configs import ONE_LOOP
from tests.distributed.layouts import parallel_section
from tests.distributed.tiny import DENSE, MOE, tiny_config

pytestmark = [pytest.mark.distributed, pytest.mark.xdist_group(__name__)]

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


REDUCE, GATHER = {"reduce_bucket_size": 1000}, {"allgather_bucket_size": 1000}
WHOLE = {"stage3_param_persistence_threshold": 0}  # else small weights stay whole
EP2_BF16 = {"parallel__expert_parallel_size": 2, "train__precision": "bf16"}
ZERO = {
    "0": (0, {}, WIDE_MOE, {}),
    "1": (1, REDUCE | GATHER, WIDE_MOE, {}),
    "1-ep2-bf16": (1, GATHER, WIDE_MOE, EP2_BF16),
    "2-ep2-bf16": (2, REDUCE | GATHER, WIDE_MOE, EP2_BF16),
    "3-bf16": (3, REDUCE | WHOLE, WIDE_DENSE, {"train__precision": "bf16"}),
}


@pytest.mark.parametrize("case", ZERO)
def test_bytes_of_deepspeed(warm_ranks, case):
    stage, zero, model, changes = ZERO[case]
    changes = {
        **{"engine": "deepspeed", "train__precision": "fp32"},
        **{"deepspeed__zero_optimization": {"stage": stage, **zero}},
        **changes,
    }
    config = tiny_config(model, **changes)
    layout, element = layout_for(config, 2), 2 if config.train.precision == "bf16" else 4
    weights = stage_weights(config.model, layout, 0)
    planned = zero_bytes(weights, layout, element, stage, bucket=1000)
    held = warm_ranks(2, "tests.distributed.plan_cases:deepspeed_bytes", model=model, **changes)
    for rank in held:
        # At the last micro batch stage 1 has whole gradients and makes this rank's part of them;
        # with bf16 weights the part is made where the sums are.
        both = stage == 1 and element == 4
        measured = rank["built"] + (rank["of one"] if both else 0) + rank["of all"]
        assert planned.parameters + planned.optimizer + planned.gradients == pytest.approx(
            measured, rel=0.05
        )


PLT3 = {"num_loops": 3, "normalize_per_loop": True}
ACTIVE = {
    # ranks, layout, model, micro batches of two sequences on each rank
    "pp2": (2, "PP2", WIDE_MOE, 4),
    "pp2-full": (2, "PP2 x full", WIDE_MOE | PLT3, 4),
    "pp2-v2-dense": (2, "PP2 x V2", WIDE_DENSE, 4),
    "pp2-vanilla": (2, "PP2", WIDE_DENSE | ONE_LOOP, 4),
    "tp2-dense": (2, "TP2", WIDE_DENSE, 1),
    "tp2-no-sp": (2, "TP2 x no SP", WIDE_DENSE | {"gate_use_hidden_states": True}, 1),
    "tp2-etp2": (2, "TP2 x ETP2", WIDE_MOE, 1),
    "tp2-full": (2, "TP2 x full", WIDE_MOE, 1),
    "cp2": (2, "CP2", WIDE_MOE, 1),
    "cp2-dense": (2, "CP2", WIDE_DENSE | {"gated_swa": False}, 1),
    "cp2-dense-selective": (2, "CP2 x selective", WIDE_DENSE | PLT3, 1),
    "ep2": (2, "EP2", WIDE_MOE, 1),
}


@pytest.mark.parametrize("case", ACTIVE)
def test_activation_bytes_of_every_stage(warm_ranks, case):
    """Alive at the end of the fullest forward pass; the mean over ranks that share their experts.

    No weight's gradient waits for loop 1 there (tests/unit/plan/test_activations.py goes back).
    """
    ranks, name, model, micro_batches = ACTIVE[case]
    changes = {f"parallel__{field}": value for field, value in parallel_section(name).items()}
    copies = ranks if name.startswith("EP") else 1
    changes["train__global_batch_size"] = 2 * micro_batches * copies
    changes["data__sequence_length"] = 128
    config = tiny_config(model | {"window_keys": 16}, **changes)
    layout = layout_for(config, ranks)
    held = warm_ranks(
        ranks,
        "tests.distributed.plan_cases:activation_bytes",
        model=model | {"window_keys": 16},
        **changes,
    )
    sizes = sizes_for(config, layout, 4, kernels=CPU)
    for stage in range(layout.pipeline_parallel_size):
        seen = [rank["most"] for rank in held if rank["stage"] == stage]
        weights = replace(stage_weights(config.model, layout, stage), in_layers=0)
        planned = _stage_memory(config, layout, sizes, stage, weights).activations
        assert planned == pytest.approx(sum(seen) / len(seen), rel=0.05), stage
