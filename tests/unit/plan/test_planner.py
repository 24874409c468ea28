"""The planner against the schedule's table, the device table, and hand-made numbers."""

import pytest
import torch

from pltmoe.config import RunConfig, config_from_dict, config_to_dict, load_config
from pltmoe.config.counts import count_parameters
from pltmoe.errors import ConfigError
from pltmoe.parallel.layout import layout_for
from pltmoe.parallel.schedule import build_schedule
from pltmoe.plan import check_fits, make_plan
from pltmoe.plan.activations import sizes_for
from pltmoe.plan.in_flight import peak_bytes
from pltmoe.plan.machines import DEFAULT, GIB, GPUS, Assumptions
from pltmoe.plan.messages import Group, step_messages
from pltmoe.plan.planner import _layer_flops
from pltmoe.plan.report import as_text
from pltmoe.plan.search import candidates, search
from pltmoe.plan.weights import stage_weights, zero_bytes
from pltmoe.runtime.devices import peak_flops
from tests.configs import ONE_LOOP
from tests.distributed.tiny import DENSE, MOE, tiny_config
from tests.repository import CONFIGS
from tests.unit.parallel.tables import in_flight


def config(name: str, *overrides: str) -> RunConfig:
    return load_config(CONFIGS / f"{name}.yaml", list(overrides))


def test_gpus_have_the_peaks_that_mfu_is_measured_by():
    for name, gpu in GPUS.items():
        assert peak_flops(f"NVIDIA {name}", torch.bfloat16) == gpu.peak_bf16


def test_unknown_gpu_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match="is not a GPU of the planner's table: give one of.*H200"):
        make_plan(config("plt_1.7b_40b"), 64, "K80")


@pytest.mark.parametrize("name", ["plt_1.7b_40b", "plt_moe_1b_7b", "vanilla_dense_1.2b"])
@pytest.mark.parametrize("layout", [(1, 1, 1), (4, 1, 1), (2, 2, 1), (1, 1, 4), (4, 2, 2)])
def test_parameters_of_all_ranks_are_those_of_the_model(name, layout):
    """Counted whole elsewhere; here by stage and rank, with what ranks hold twice taken off."""
    pp, tp, ep = layout
    if "dense" in name and ep > 1:
        pytest.skip("no experts")
    run = config(
        name,
        f"parallel.pipeline_parallel_size={pp}",
        f"parallel.tensor_parallel_size={tp}",
        f"parallel.expert_parallel_size={ep}",
    )
    m, arrangement = run.model, layout_for(run, 16)
    counts = [stage_weights(m, arrangement, stage) for stage in range(pp)]
    twice = m.num_layers * (
        2 * m.hidden_size + 2 * m.head_dim * m.qk_norm + (m.num_experts or 0) * m.hidden_size
    )
    copies = (tp - 1) * (twice + m.hidden_size)
    copies += m.vocab_size * m.hidden_size if m.tied_embeddings and pp > 1 else 0
    held = sum(tp * c.shared + ep * c.experts for c in counts)
    assert held - copies == count_parameters(m).total


@pytest.mark.parametrize(
    ("stages", "loops", "chunks", "micro_batches"),
    [(1, 2, 1, 4), (2, 1, 1, 8), (4, 1, 1, 2), (2, 2, 1, 8), (4, 2, 2, 9), (4, 3, 1, 64)],
)
def test_loop_chunks_under_way_are_the_schedules(stages, loops, chunks, micro_batches):
    """Also where the planner looks at fewer micro batches than the step has."""
    kind = ONE_LOOP if loops == 1 else {"num_loops": loops}
    run = tiny_config(
        MOE | kind | {"num_layers": 8},
        parallel__pipeline_parallel_size=stages,
        parallel__model_chunks_per_stage=chunks,
        train__global_batch_size=2 * micro_batches,
    )
    layout = layout_for(run, stages)
    for stage, order in enumerate(build_schedule(stages, loops, chunks, micro_batches)):
        most, alive = peak_bytes(layout, stage, lambda loop, chunk: 1.0, lambda chunk: 0.0)
        assert most == alive == in_flight(order)


def test_lent_gradients_wait_for_loop_1():
    layout = layout_for(tiny_config(MOE), 1)
    light = peak_bytes(layout, 0, lambda loop, _: float(loop), lambda _: 1.5)
    assert light == (1 + 2, 2)  # loop 2's backward frees more than it leaves
    heavy = peak_bytes(layout, 0, lambda loop, _: float(loop), lambda _: 2.5)
    assert heavy == (1 + 2.5, 1)


def test_collectives_split_between_nvlink_and_network():
    """Eight GPUs a node: neighbours stay inside, strided groups meet nobody there."""
    inside = Group(8, 1).gather("x", 80.0, DEFAULT)
    assert (inside.inside, inside.between) == (70.0, 0.0)
    across = Group(4, 8).gather("x", 80.0, DEFAULT)
    assert (across.inside, across.between) == (0.0, 60.0)
    both = Group(16, 1).exchange("x", 160.0, DEFAULT)
    assert (both.inside, both.between) == (70.0, 80.0)


def test_messages_by_hand():
    """Two ranks, 16 slots x 2 sequences x 4 micro batches / 2 ranks, d 32, 2 layers, 2 loops."""
    run = tiny_config(MOE, parallel__expert_parallel_size=2)
    layout = layout_for(run, 2)
    z, weights = sizes_for(run, layout, 2), stage_weights(run.model, layout, 0)
    sent = {m.kind: m.total for m in step_messages(z, layout, weights, "none", DEFAULT)}
    copies = 32 * 2 * (32 * 2 + 4)  # tokens x top-k x (d in bf16, weight in fp32)
    passes = 2 * 2 * 2  # layers x loops x micro batches
    assert sent["EP all-to-all"] == copies * 4 * passes / 2  # half stays
    assert sent["DP gradients"] == 4 * weights.shared / 2  # each expert has one copy
    assert sent["DP weights"] == 2 * weights.shared / 2
    again = {m.kind: m.total for m in step_messages(z, layout, weights, "full", DEFAULT)}
    assert again["EP all-to-all"] == sent["EP all-to-all"] * 6 / 4


def test_stages_hand_on_every_loop_chunk():
    run = tiny_config(DENSE, parallel__pipeline_parallel_size=2)
    layout = layout_for(run, 2)
    z, weights = sizes_for(run, layout, 2), stage_weights(run.model, layout, 0)
    (message,) = step_messages(z, layout, weights, "none", DEFAULT)
    assert message.kind == "PP"
    assert message.total == 2 * 2 * 4 * (32 * 32 * 2)  # ways x loops x micro batches x [t, d]
    assert message.between == 0


def test_small_stages_on_several_nodes_send_over_the_network():
    """Four stages of four ranks: two share a node, but some boundary lies between nodes."""
    run = tiny_config(
        DENSE | {"num_layers": 4},
        parallel__pipeline_parallel_size=4,
        parallel__tensor_parallel_size=2,
        train__global_batch_size=16,
    )
    layout = layout_for(run, 16)
    z, weights = sizes_for(run, layout, 2), stage_weights(run.model, layout, 0)
    messages = step_messages(z, layout, weights, "none", DEFAULT)
    (message,) = [message for message in messages if message.kind == "PP"]
    assert message.inside == 0 < message.between


def test_the_update_may_need_more_than_backward():
    """PyTorch's AdamW takes the roots of all second moments of a rank at once."""
    run = config("plt_1.7b_40b", "parallel.recompute=full", "train.micro_batch_size=1")
    stage = make_plan(run, 8).fullest
    held = stage.weights.parameters + stage.weights.gradients + stage.weights.optimizer
    assert stage.peak == held + 4 * stage.weights.shard
    assert stage.parts["working memory"] > stage.activations + stage.working


def test_layer_flops_add_up():
    """Split by kind for the efficiencies, they are still the model's FLOPs."""
    plan = make_plan(config("plt_dense_1.2b"), 8)
    m, s = plan.config.model, 4096
    parts = _layer_flops(m, s)
    head = 2 * m.vocab_size * m.hidden_size
    tokens = s * plan.layout.global_batch_size
    assert 3 * (sum(parts) * m.num_layers + head) * tokens == pytest.approx(plan.flops_per_step)
    assert all(part > 0 for part in (parts[0], parts[2]))


def test_at_full_efficiency_without_messages_mfu_is_nearly_one():
    ideal = Assumptions(
        dense_efficiency=1.0, attention_efficiency=1.0, network=1e30, memory_efficiency=1e6
    )
    plan = make_plan(config("vanilla_dense_1.2b"), 16, assumptions=ideal)
    assert plan.mfu == pytest.approx(1.0, rel=0.05)


def test_a_pipeline_pays_its_bubble_once():
    run = config("plt_dense_1.2b", "parallel.pipeline_parallel_size=4")
    plan = make_plan(run, 64)
    work, waits = 2 * plan.layout.micro_batches, 3
    assert plan.bubble == pytest.approx(waits / (work + waits))
    busy = plan.compute_seconds + plan.message_seconds
    step = busy * (work + waits) / work + plan.data_seconds + plan.optimizer_seconds
    assert plan.step_seconds == pytest.approx(step)


def test_recompute_trades_memory_for_time():
    plans = [
        make_plan(config("plt_moe_1b_7b", f"parallel.recompute={mode}"), 8)
        for mode in ("none", "selective", "full")
    ]
    memory = [plan.fullest.activations for plan in plans]
    assert memory == sorted(memory, reverse=True) and memory[2] < memory[0] / 3
    seconds = [plan.step_seconds for plan in plans]
    assert seconds == sorted(seconds)


@pytest.mark.parametrize(
    ("zero", "says"),
    [
        ({"stage": 1}, "ZeRO stage 1\n"),
        ({"stage": 2}, "ZeRO stage 2; times leave out gradients sent for every micro batch\n"),
        (
            {"stage": 3, "offload_optimizer": {"device": "cpu"}, "reduce_bucket_size": 1e9},
            "ZeRO stage 3; times leave out an optimizer offloaded to cpu, gradients sent for every "
            "micro batch, weights gathered in every pass\n",
        ),
    ],
)
def test_deepspeed_is_planned_with_its_stage_offload_and_bucket(zero, says):
    """The bytes themselves are measured in tests/distributed/test_plan.py."""
    tree = config_to_dict(config("plt_dense_1.2b")) | {"engine": "deepspeed"}
    run = config_from_dict(tree | {"deepspeed": {"zero_optimization": zero}})
    plan = make_plan(run, 8)
    weights = stage_weights(run.model, plan.layout, 0)
    offloaded, bucket = "offload_optimizer" in zero, zero.get("reduce_bucket_size", 5e8)
    expected = zero_bytes(weights, plan.layout, 2, zero["stage"], offloaded, bucket)
    assert plan.stages[0].weights == expected
    assert f"engine        deepspeed, {says}" in as_text(plan)


def test_what_does_not_fit_is_refused_with_parts_and_advice():
    check_fits(make_plan(config("plt_1.7b_40b"), 64))
    with pytest.raises(ConfigError) as refused:
        check_fits(make_plan(config("vanilla_2.5b_60b"), 8))
    message = str(refused.value)
    assert "vanilla-2.5b-60b does not fit on 8 x H200 (EP8 x DP8)" in message
    plan = make_plan(config("vanilla_2.5b_60b"), 8)
    assert f"stage 0 needs {plan.fullest.peak / GIB:.1f} GiB per GPU and has" in message
    assert "biggest parts: optimizer" in message and "parallel.pipeline_parallel_size" in message
    assert "tools/plan.py --gpus 8 --search lists" in message and "recompute" not in message
    with pytest.raises(ConfigError, match=r"multiple of .*; tools/plan.py --gpus 24 --search list"):
        make_plan(config("plt_1.7b_40b"), 24)


def test_activations_that_do_not_fit_are_answered_with_recompute():
    run = config("plt_moe_1b_7b", "train.micro_batch_size=8")
    with pytest.raises(ConfigError, match="biggest parts: activations.*parallel.recompute=full"):
        check_fits(make_plan(run, 8, "H100"))
    run = config("plt_1.7b_40b")  # also where weights are more than activations
    with pytest.raises(ConfigError, match=r"Try parallel.recompute=full, which fits; tools/plan"):
        check_fits(make_plan(run, 16, "H100"))
    assert make_plan(config("plt_1.7b_40b", "parallel.recompute=full"), 16, "H100").fits


def test_search_says_why_nothing_can_be_planned():
    """The batch does not divide, on whatever GPU; "give more" is for what does not fit."""
    run = config("vanilla_dense_1.2b")
    among = candidates(run, 48)[:40]
    with pytest.raises(ConfigError, match=r"can be planned on 48 x H200.*global_batch_size \(1024"):
        search(run, 48, "H200", among)
    big = config("vanilla_2.5b_60b")
    assert search(big, 1, "H100", candidates(big, 1)) == []


def test_search_returns_only_what_fits_fastest_first():
    run = config("vanilla_2.5b_60b")
    among = [c for c in candidates(run, 64) if c.recompute == "full" and c.micro_batch_size == 1]
    found = search(run, 64, "H100", among)
    assert 0 < len(found) < len(among)
    seconds = [plan.step_seconds for _, plan in found]
    assert seconds == sorted(seconds)
    assert all(plan.fits for _, plan in found)
    candidate, plan = found[0]
    otherwise = ("parallel.sequence_parallel=false", "parallel.overlap_grad_reduce=true")
    again = config("vanilla_2.5b_60b", *otherwise, *candidate.overrides())  # as a user gives it
    assert again == candidate.apply(run), "whatever was configured before"
    assert make_plan(again, 64, "H100").fullest.peak == plan.fullest.peak
