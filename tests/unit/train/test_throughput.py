"""Throughput arithmetic, and the line of a step."""

import pytest

from pltmoe.config.counts import flops_per_token
from pltmoe.train.callbacks.log_line import describe
from pltmoe.train.throughput import Throughput
from tests.distributed.tiny import tiny_config


def test_throughput_since_the_last_answer():
    config = tiny_config()
    throughput = Throughput(config, world_size=2, peak_flops=1e9)
    throughput.add(1.0)
    throughput.add(3.0)
    first = throughput.take()
    tokens = 8 * 16 / 2.0
    flops = flops_per_token(config.model, 16)
    assert first["perf/seconds_per_step"] == 2.0
    assert first["perf/tokens_per_second"] == tokens
    assert first["perf/tokens_per_second_per_gpu"] == tokens / 2
    assert first["perf/tflops_per_gpu"] == pytest.approx(tokens / 2 * flops / 1e12)
    assert first["perf/mfu"] == pytest.approx(tokens / 2 * flops / 1e9)
    throughput.add(5.0)
    assert throughput.take()["perf/seconds_per_step"] == 5.0
    assert "perf/mfu" not in Throughput(config, 1, None).take()


def test_the_line_of_a_step():
    metrics = {
        "train/loss": 5.12345,
        "optim/lr": 3e-4,
        "optim/grad_norm": 0.8123,
        "perf/tokens_per_second": 12345.6,
        "perf/tflops_per_gpu": 0.1234,
        "perf/seconds_per_step": 0.5,
        "memory/peak_gib": 1.5,
    }
    assert describe(20, 500, metrics) == (
        "step 20/500  loss 5.1235  lr 3.00e-04  grad 0.812  12,346 tokens/s  "
        "0.123 TFLOP/s per device  mem 1.50 GiB  ETA 0:04:00"
    )
    assert "MFU 41.2%  mem" in describe(20, 500, metrics | {"perf/mfu": 0.4123})
