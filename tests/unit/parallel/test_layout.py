"""Rank arithmetic and its messages."""

import pytest

from pltmoe.errors import ConfigError, EngineError
from pltmoe.parallel.layout import layout_for
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
