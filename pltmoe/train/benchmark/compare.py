"""The comparisons: what is measured against what, and which ratio is wanted."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from pltmoe.config import RunConfig
from pltmoe.parallel.groups import create_groups, destroy_groups
from pltmoe.parallel.layout import Layout, layout_for
from pltmoe.runtime import devices, seeds
from pltmoe.runtime.versions import commit, versions
from pltmoe.train.benchmark import candidates
from pltmoe.train.benchmark.report import Goal, Report, row
from pltmoe.train.benchmark.timing import Candidate, Times, measure, profile, ratio


@dataclass(frozen=True)
class Comparison:
    """One ratio: ``slow``'s time over ``fast``'s; other candidates are shown beside them."""

    title: str
    goal: Goal
    slow: str
    fast: str
    build: Callable[[RunConfig, ProcessGroupCollection], list[Candidate]]
    notes: tuple[str, ...]
    same_losses: bool = False
    """Whether both compute the same function from the same weights, so losses must agree."""


COMPARISONS = {
    "loops": Comparison(
        "looped step / vanilla step of the same layers",
        Goal(at_most=2.15),
        "looped",
        "vanilla",
        candidates.loops,
        (
            "embedding, head and optimizer run once in both, so the FLOPs of two loops are less "
            "than double; what loops add is in their layers, the shift and the gated window",
        ),
    ),
    "megatron": Comparison(
        "our vanilla step / Megatron-core's own GPT MoE of the same size",
        Goal(at_most=1.03),
        "vanilla",
        "Megatron-core",
        candidates.megatron,
        (
            "the same in both: weights, batches, rms_norm of PyTorch, "
            "one GEMM pair per expert (SequentialMLP), Megatron-core's dispatcher, data-parallel "
            "wrapper, distributed optimizer and schedule of micro batches",
            "different: Megatron-core's local attention keeps all scores (two batched products "
            "and a softmax), ours is scaled_dot_product_attention; with that put into "
            "Megatron-core's model the third line is measured",
            "different: our routers sum statistics, and our step looks for gradients that are not "
            "finite before it updates",
        ),
        same_losses=True,
    ),
}


@dataclass(frozen=True)
class Options:
    """How long to measure."""

    rounds: int = 20
    warm_up: int = 3
    profile: bool = False
    """Also show which operations take the time."""


def compare(name: str, config: RunConfig, options: Options, command: str) -> tuple[Report, str]:
    """Measure one comparison in this process (processes have been started).

    Returns:
        The report, and the profiles of both candidates when they were asked for.
    """
    what = COMPARISONS[name]
    layout = layout_for(config, dist.get_world_size())
    groups = create_groups(layout)
    try:
        seeds.seed_everything(config.train.seed)
        built = what.build(config, groups)
        times = measure(built, options.rounds, options.warm_up)
        profiles = [_profile(c, options) for c in built] if options.profile else []
    finally:
        destroy_groups()
    report = Report(
        name,
        what.title,
        what.goal,
        ratio(times, what.slow, what.fast),
        [row(c, times[c.name]) for c in built],
        setup(config, layout, options),
        where(command),
        _notes(what, built, times),
    )
    return report, "\n".join(profiles)


def _notes(what: Comparison, built: list[Candidate], times: Mapping[str, Times]) -> list[str]:
    """Return what a reader must know to judge the ratio, the measured things first."""
    by_name = {c.name: c for c in built}
    flops = by_name[what.slow].flops / by_name[what.fast].flops
    notes = [f"{what.slow} must do {flops:.3f} times the FLOPs of {what.fast}"]
    for c in built[2:]:
        notes.append(f"{what.slow} / {c.name}: {ratio(times, what.slow, c.name).median:.3f}")
    if what.same_losses:
        pairs = zip(times[what.slow].losses, times[what.fast].losses, strict=True)
        notes.append(f"largest difference of their losses: {max(abs(a - b) for a, b in pairs):.1e}")
    return [*notes, *what.notes]


def setup(config: RunConfig, layout: Layout, options: Options) -> dict[str, str]:
    """Say what ran."""
    m, experts = config.model, ""
    if m.is_moe:
        experts = f", {m.num_experts} experts top-{m.moe_top_k} of width {m.moe_ffn_hidden_size}"
    return {
        "model": f"{m.num_layers} layers of width {m.hidden_size}, {m.num_attention_heads} heads "
        f"({m.num_kv_heads} KV) of {m.head_dim}{experts}, vocabulary {m.vocab_size:,}; looped: "
        f"{m.num_loops} loops, window {m.local_window}",
        "step": f"{layout.micro_batches} micro batch(es) of {layout.micro_batch_size} x "
        f"{config.data.sequence_length} tokens on each rank, {layout} ({layout.world_size} "
        f"process(es)), {devices.precision_name(config.train.precision)}, recompute "
        f"{config.parallel.recompute}",
        "rounds": f"{options.rounds}, after {options.warm_up} to warm up; in turn, median",
    }


def where(command: str) -> dict[str, str]:
    """Say what it ran on."""
    threads = "" if torch.cuda.is_available() else f", {torch.get_num_threads()} thread(s) each"
    return {
        "command": f"`{command}`",
        "device": devices.device_name() + threads,
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
        "commit": commit(),
    }


def _profile(candidate: Candidate, options: Options) -> str:
    table = profile(candidate, options.warm_up + options.rounds + 1)
    return f"{candidate.name}, one step\n{table}"
