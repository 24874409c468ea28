"""Rank arithmetic and its messages."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.parallel_state import RankGenerator

from pltmoe.errors import ConfigError, EngineError
from pltmoe.parallel.layout import Layout, layout_for
from tests.distributed.tiny import tiny_config


def test_sizes_follow_from_world_size_and_expert_parallelism():
    config = tiny_config(
        parallel__expert_parallel_size=2, train__global_batch_size=48, train__micro_batch_size=3
    )
    layout = layout_for(config, 4)
    assert str(layout) == "EP2 x DP4"
    assert layout.data_parallel_size == 4
    assert layout.expert_data_parallel_size == 2
    assert layout.micro_batches == 4
    assert str(layout_for(config, 2)) == "EP2 x DP2"


def test_processes_that_make_no_whole_expert_groups():
    with pytest.raises(EngineError) as error:
        layout_for(tiny_config(parallel__expert_parallel_size=2), 3)
    assert str(error.value) == (
        "3 process(es) cannot be split into groups of parallel.expert_parallel_size (2): start "
        "torchrun with a multiple of 2 processes, or set parallel.expert_parallel_size=1"
    )


def test_global_batch_that_is_not_whole_on_every_rank():
    with pytest.raises(ConfigError) as error:
        layout_for(tiny_config(), 3)
    assert str(error.value) == (
        "train.global_batch_size (8) must be a multiple of train.micro_batch_size (2) x "
        "data-parallel size (3, of 3 processes) = 6"
    )


def test_attention_groups_that_do_not_fit_are_named():
    config = tiny_config(
        parallel__tensor_parallel_size=2,
        parallel__pipeline_parallel_size=2,
        train__global_batch_size=8,
    )
    with pytest.raises(EngineError) as error:
        layout_for(config, 6)
    assert str(error.value) == (
        "6 process(es) cannot be split into groups of parallel.tensor_parallel_size (2) x "
        "parallel.pipeline_parallel_size (2): start torchrun with a multiple of 4 processes, or "
        "set parallel.tensor_parallel_size=1 parallel.pipeline_parallel_size=1"
    )
    assert str(layout_for(config, 4)) == "PP2 x TP2 x DP1"


def test_a_pipeline_of_loops_needs_as_many_micro_batches_as_stages():
    config = tiny_config(parallel__pipeline_parallel_size=2, train__global_batch_size=2)
    with pytest.raises(ConfigError) as error:
        layout_for(config, 2)
    assert str(error.value) == (
        "train.global_batch_size (2) makes 1 micro batch(es) per step, fewer than "
        "parallel.pipeline_parallel_size (2): loops are interleaved over the stages, which takes "
        "at least 2; raise train.global_batch_size to 4 or more"
    )


SIZES = st.fixed_dictionaries(
    {
        "tensor_parallel_size": st.integers(1, 3),
        "context_parallel_size": st.integers(1, 3),
        "pipeline_parallel_size": st.integers(1, 3),
        "expert_parallel_size": st.integers(1, 3),
        "expert_tensor_parallel_size": st.integers(1, 2),
        "model_chunks_per_stage": st.integers(1, 3),
    }
)


@settings(deadline=None)
@given(SIZES, st.integers(1, 2))
def test_ranks_stand_where_megatron_puts_them(sizes, copies):
    """Coordinates are a bijection, and each group is one of Megatron's, for both numberings."""
    inner = math.lcm(
        sizes["tensor_parallel_size"] * sizes["context_parallel_size"],
        sizes["expert_parallel_size"] * sizes["expert_tensor_parallel_size"],
    )
    world = inner * sizes["pipeline_parallel_size"] * copies
    layout = Layout(world_size=world, micro_batch_size=1, global_batch_size=1, **sizes)
    where = [layout.coordinates(rank) for rank in range(world)]
    assert len(set(where)) == world
    tp, cp, pp = (sizes[f"{k}_parallel_size"] for k in ("tensor", "context", "pipeline"))
    ep, etp = sizes["expert_parallel_size"], sizes["expert_tensor_parallel_size"]
    attention = RankGenerator(tp, 1, layout.data_parallel_size, pp, cp, "tp-cp-ep-dp-pp")
    experts = RankGenerator(etp, ep, layout.expert_data_parallel_size, pp, 1, "tp-cp-ep-dp-pp")
    for generator, token, axis in (
        (attention, "tp", "tensor"),
        (attention, "cp", "context"),
        (attention, "dp", "data"),
        (attention, "pp", "stage"),
        (experts, "tp", "expert_tensor"),
        (experts, "ep", "expert"),
        (experts, "dp", "expert_data"),
        (experts, "pp", "stage"),
    ):
        for group in generator.get_ranks(token):
            places = [getattr(where[rank], axis) for rank in group]
            assert places == list(range(len(group))), (token, group)


@given(SIZES, st.integers(1, 3))
def test_every_layer_is_held_by_one_chunk(sizes, size):
    stages, chunks = sizes["pipeline_parallel_size"], sizes["model_chunks_per_stage"]
    layers = size * stages * chunks
    layout = Layout(world_size=stages, micro_batch_size=1, global_batch_size=1, **sizes)
    held = [layout.stage_chunks(layers, stage) for stage in range(stages)]
    assert all(len(ranges) == chunks for ranges in held)
    order = [n for c in range(chunks) for stage in range(stages) for n in held[stage][c]]
    assert order == list(range(layers))  # chunk by chunk, through all stages
