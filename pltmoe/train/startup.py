"""What is said once at the start: software, device, layout, sizes, and who computes what."""

import logging
from collections.abc import Iterator

from pltmoe.config import RunConfig
from pltmoe.config.counts import count_parameters, flops_per_token
from pltmoe.data.indexed import read_pair
from pltmoe.engines.base import Capabilities
from pltmoe.parallel.layout import Layout
from pltmoe.parallel.schedule import bubble_fraction
from pltmoe.runtime import cpu, devices, distributed
from pltmoe.runtime.logs import log_block
from pltmoe.runtime.versions import commit, versions

logger = logging.getLogger(__name__)

_LISTED_SOURCES = 16


def log_startup(config: RunConfig, capabilities: Capabilities, source: str) -> None:
    """Write the start-up block on rank 0; ``source`` says where the weights come from."""
    if distributed.is_main():
        log_block(logger, f"run {config.name}", startup_rows(config, capabilities, source))


def startup_rows(
    config: RunConfig, capabilities: Capabilities, source: str
) -> list[tuple[str, str]]:
    """Return the rows of the start-up block as (name, value)."""
    layout, train, model = capabilities.layout, config.train, config.model
    parameters = count_parameters(model)
    flops = flops_per_token(model, config.data.sequence_length)
    tokens = train.global_batch_size * config.data.sequence_length
    rows = [
        ("versions", ", ".join(f"{name} {version}" for name, version in versions().items())),
        ("commit", commit()),
        ("device", _device()),
        ("layout", f"{layout} ({layout.world_size} process(es), one per device)"),
        ("schedule", _schedule(layout)),
        ("recomputation", config.parallel.recompute),
        ("precision", _precision(capabilities.precision)),
        ("parameters", f"{parameters.total:,} total, {parameters.active:,} active per token"),
        ("loops", f"{model.num_loops} x {model.num_layers} layers"),
        ("FLOPs per token", f"{flops:.4g} (forward and backward)"),
        (
            "tokens per step",
            f"{tokens:,} = {train.global_batch_size} sequences x {config.data.sequence_length}; "
            f"{layout.micro_batches} micro batch(es) of {train.micro_batch_size} per process",
        ),
        ("steps", f"{train.steps:,} = {train.steps * tokens:,} tokens"),
        *(("data", text) for text in _sources(config, train.steps * tokens)),
        ("validation", _every(train.eval_interval, "none (train.eval_interval is not set)")),
        (
            "checkpoints",
            _every(
                config.checkpoint.save_interval,
                "after the last step only (checkpoint.save_interval is not set)",
            ),
        ),
    ]
    rows += [(job, str(backend)) for job, backend in capabilities.backends.items()]
    return rows + [("weights", source), ("output", str(train.output_dir))]


def _sources(config: RunConfig, tokens: int) -> Iterator[str]:
    """Say of each training source how often ``tokens`` of the run go through its text; of many,
    those that are repeated most."""
    data, found = config.data, []
    part = 1.0 if data.split is None else data.split[0] / sum(data.split)
    weights = sum(source.weight for source in data.train)
    for source in data.train:
        share, length = source.weight / weights, read_pair(source.path).tokens
        times = tokens * share / (length * part)
        text = f"{times:.3g} times through {length * part:,.0f} tokens"
        found.append((times, f"{source.path}: {share:.1%} of the sequences, {text}"))
    if len(found) > _LISTED_SOURCES:
        found.sort(key=lambda pair: -pair[0])
    yield from (text for _, text in found[:_LISTED_SOURCES])
    if more := found[_LISTED_SOURCES:]:
        yield f"{len(more):,} more, each at most {more[0][0]:.3g} times through its text"


def _every(interval: int | None, otherwise: str) -> str:
    return otherwise if interval is None else f"every {interval:,} steps"


def _schedule(layout: Layout) -> str:
    stages, loops, chunks = (
        layout.pipeline_parallel_size,
        layout.num_loops,
        layout.model_chunks_per_stage,
    )
    if stages == 1:
        return "one stage: all loops of a micro batch in one pass"
    waiting = bubble_fraction(stages, loops, chunks, layout.micro_batches)
    kind = "interleaved 1F1B" if layout.loop_chunks > 1 else "1F1B"
    return (
        f"{kind}, {stages} stages x {loops} loop(s) x {chunks} model chunk(s): stages wait "
        f"{waiting:.1%} of the time"
    )


def _device() -> str:
    if cpu.is_standing_in():
        return f"{devices.device_name()}: there is no GPU, the CPU stands in for CUDA"
    return devices.device_name()


def _precision(name: str) -> str:
    if name == "fp32":
        return "fp32"
    products = ", matrix products in FP8" if name == "fp8" else ""
    return f"bf16 weights and activations, fp32 master weights and gradients{products}"
