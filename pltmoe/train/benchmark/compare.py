"""The comparisons: what is measured against what, and which ratio is wanted."""

import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from pltmoe.config import RunConfig
from pltmoe.config.counts import count_parameters
from pltmoe.errors import EngineError
from pltmoe.parallel.groups import create_groups, destroy_groups
from pltmoe.parallel.layout import Layout, layout_for
from pltmoe.runtime import devices, seeds
from pltmoe.runtime.versions import commit, versions
from pltmoe.train.benchmark import candidates
from pltmoe.train.benchmark.configs import MEGATRON, ZERO
from pltmoe.train.benchmark.pipeline import FORWARD_BACKWARD, PREDICTED, measure_pipeline
from pltmoe.train.benchmark.report import Goal, Report, row
from pltmoe.train.benchmark.timing import Candidate, Times, Work, measure, profile, ratio


@dataclass(frozen=True)
class Options:
    """How long to measure."""

    rounds: int = 20
    warm_up: int = 3
    profile: bool = False
    """Also show which operations take the time."""


@dataclass(frozen=True)
class Measured:
    """What was measured, in the order of the table."""

    works: Sequence[Work]
    times: Mapping[str, Times]
    profiles: Sequence[str] = ()
    notes: Sequence[str] = ()


def in_turn(
    build: Callable[[RunConfig, ProcessGroupCollection], list[Candidate]],
) -> Callable[[RunConfig, ProcessGroupCollection, Options], Measured]:
    """Measure the candidates that ``build`` makes, step by step in turn."""

    def measured(config: RunConfig, groups: ProcessGroupCollection, options: Options) -> Measured:
        built = build(config, groups)
        times = measure(built, options.rounds, options.warm_up)
        number = options.warm_up + options.rounds + 1
        profiles = [_profile_or_why_not(c, number) for c in built] if options.profile else []
        return Measured(built, times, profiles)

    return measured


def _profile_or_why_not(candidate: Candidate, number: int) -> str:
    """Return a profile; one that fails does not take with it what was measured."""
    try:
        return profile(candidate, number)
    except Exception as error:
        traceback.print_exc()
        return f"### {candidate.name}\n\nNot profiled: {type(error).__name__}: {error}\n"


def engines(config: RunConfig, groups: ProcessGroupCollection, options: Options) -> Measured:
    """Measure both engines, step by step in turn, and what they hold."""
    built, notes = candidates.engines(config, groups)
    return replace(in_turn(lambda *_: built)(config, groups, options), notes=notes)


def stages(config: RunConfig, groups: ProcessGroupCollection, options: Options) -> Measured:
    """Measure a pipelined step, and what the table predicts for it."""
    layout = layout_for(config, dist.get_world_size())
    times = measure_pipeline(config, layout, groups, options.rounds, options.warm_up)
    return Measured([Work(name, *candidates.work_of(config)) for name in times], times)


@dataclass(frozen=True)
class Comparison:
    """One ratio: ``slow``'s time over ``fast``'s; other candidates are shown beside them."""

    title: str
    goal: Goal
    slow: str
    fast: str | None
    """None: one model alone, whose MFU is measured."""
    measure: Callable[[RunConfig, ProcessGroupCollection, Options], Measured]
    notes: tuple[str, ...]
    same_losses: bool = False
    """Whether both compute the same function from the same weights, so losses must agree."""
    goal_on_gpu: Goal | None = None
    """Where it is not the same there."""


SAME_LOSS = {"fp32": 1e-4, "bf16": 1e-2, "fp8": 5e-2}
"""By how much, in nats per token, losses may differ that must be the same. In fp32 rounding parts
them by 1e-6 in 20 updates, and a mistake (a model that does not know that its experts are cut) by
3e-3 to 3e-2. In bf16 a logit is off by 2^-8 of itself, which averages out over
512 tokens to 1e-3; FP8 has four bits fewer. These two are guesses: no GPU has measured them."""
COMPARISONS = {
    "loops": Comparison(
        "looped step / vanilla step of the same layers",
        Goal(at_most=2.15),
        "looped",
        "vanilla",
        in_turn(candidates.loops),
        (
            "embedding, head and optimizer run once in both, so the FLOPs of two loops are less "
            "than double; what loops add is in their layers, the shift and the gated window",
        ),
        goal_on_gpu=Goal(at_most=2.05),
    ),
    "megatron": Comparison(
        "our vanilla step / Megatron-core's own GPT MoE of the same size",
        Goal(at_most=1.03),
        "vanilla",
        "Megatron-core",
        in_turn(candidates.megatron),
        (
            "the same in both: weights, batches, layout, precision, Megatron-core's dispatcher, "
            "data-parallel wrapper, distributed optimizer and schedule of micro batches; both from "
            "Transformer Engine's layers where our engine uses them, else both from local ones",
            "different with local layers: Megatron-core's attention keeps all scores (two batched "
            "products and a softmax), ours is scaled_dot_product_attention; with that put into "
            "Megatron-core's model the third line is measured. On a GPU our experts are then one "
            "grouped product, Megatron-core's one pair of products each",
            "the same in both: no statistics of the routers, that Megatron-core takes in each "
            "pass and we in steps that are logged",
            "different: our step looks for gradients that are not finite before it updates",
        ),
        same_losses=True,
        goal_on_gpu=Goal(at_most=1.0),
    ),
    "precision": Comparison(
        "a step with matrix products in FP8 / the same step in bf16",
        Goal(at_most=0.80),
        "fp8",
        "bf16",
        in_turn(candidates.precisions),
        ("router, gate, norms, embedding, head and optimizer are the same in both",),
    ),
    "engines": Comparison(
        "a step of DeepSpeed's ZeRO 2 / the same step of the Megatron engine",
        Goal(at_most=1.5),
        ZERO,
        MEGATRON,
        engines,
        (
            "Megatron keeps its gradient buffers between steps, DeepSpeed does not; on a CPU host "
            "memory is the device's memory, so that an optimizer there saves nothing",
        ),
    ),
    "mfu": Comparison(
        "a step of one model alone",
        Goal(at_least=0.45),
        candidates.ALONE,
        None,
        in_turn(candidates.alone),
        ("MFU: FLOPs that the model must compute, all loops, of the peak in bf16 (with FP8, too)",),
    ),
    "pipeline": Comparison(
        "a step's forward and backward on the stages / what the schedule table predicts",
        Goal(at_most=1.15, at_least=0.85),
        FORWARD_BACKWARD,
        PREDICTED,
        stages,
        (
            "predicted from the time of each loop chunk's forward and backward pass on its stage, "
            "measured without messages on all stages at the same time, and the order of work in "
            "the table; a prediction before every step",
        ),
    ),
}


def compare(name: str, config: RunConfig, options: Options, command: str) -> tuple[Report, str]:
    """Measure one comparison, which configs.check has let pass; processes have been started.

    Returns:
        The report, and the profiles of both candidates when they were asked for.

    Raises:
        ConfigError: an engine whose ratio is wanted cannot be built.
        EngineError: what was measured does not do the same work, or the processes do not fit.
    """
    what = COMPARISONS[name]
    layout = layout_for(config, dist.get_world_size())
    groups = create_groups(layout)
    try:
        seeds.seed_everything(config.train.seed)
        found = what.measure(config, groups, options)
    finally:
        destroy_groups()
    if what.same_losses:
        check_losses(found, what.slow, devices.precision_name(config.train.precision))
    report = Report(
        name,
        what.title,
        (torch.cuda.is_available() and what.goal_on_gpu) or what.goal,
        ratio(found.times, what.slow, what.fast) if what.fast else None,
        [row(work, found.times[work.name], _peak_flops(config)) for work in found.works],
        setup(config, layout, options),
        where(command),
        _notes(what, found),
    )
    return report, "\n".join(found.profiles)


def losses_apart(found: Measured, name: str) -> dict[str, float]:
    """Return by how much, at most, the losses of each other candidate differ from ``name``'s."""

    def apart(other: str) -> float:  # what is not a number stays so
        ours, theirs = (
            torch.tensor(found.times[n].losses, dtype=torch.float64) for n in (name, other)
        )
        return (ours - theirs).abs().max().item()

    others = [work.name for work in found.works if work.name != name]
    return {other: apart(other) for other in others}


def check_losses(found: Measured, name: str, precision: str) -> None:
    """Raise EngineError if a candidate that must do the same work as ``name`` does not."""
    bound = SAME_LOSS[precision]
    for other, most in losses_apart(found, name).items():
        if not most <= bound:
            raise EngineError(
                f"the losses of {name} and {other} differ by {most:.1e} nats, more than {bound:g} "
                f"in {precision}: they do not do the same work, so their times say nothing; look "
                "for a setting that only one of them follows, or take fewer --rounds (after many "
                "updates rounding alone parts them)"
            )


def _peak_flops(config: RunConfig) -> float | None:
    """Return the FLOP/s of all devices together."""
    dtype = devices.parameter_dtype(config.train.precision)
    one = devices.peak_flops(devices.device_name(), dtype)
    return None if one is None else one * dist.get_world_size()


def _notes(what: Comparison, found: Measured) -> list[str]:
    """Return what a reader must know to judge the ratio, the measured things first."""
    notes = [f"peak memory of this process: {devices.peak_memory_gib():.1f} GiB"]
    if what.fast is None:
        return [*notes, *what.notes]
    flops = {work.name: work.flops for work in found.works}
    if flops[what.slow] != flops[what.fast]:
        more = flops[what.slow] / flops[what.fast]
        notes.append(f"{what.slow} must do {more:.3f} times the FLOPs of {what.fast}")
    for name in [name for name in flops if name not in (what.slow, what.fast)]:
        beside = ratio(found.times, what.slow, name).median
        notes.append(f"{what.slow} / {name}: {beside:.3f}")
    if what.same_losses:
        most = max(losses_apart(found, what.slow).values())
        notes.append(f"largest difference of their losses: {most:.1e}")
    return [*notes, *found.notes, *what.notes]


def setup(config: RunConfig, layout: Layout, options: Options) -> dict[str, str]:
    """Say what ran."""
    m, experts, precision = config.model, "", devices.precision_name(config.train.precision)
    if precision == "fp8":
        precision = f"fp8 ({config.train.fp8_recipe})"
    parameters = count_parameters(m)
    if m.is_moe:
        experts = f", {m.num_experts} experts top-{m.moe_top_k} of width {m.moe_ffn_hidden_size}"
    return {
        "model": f"{m.num_layers} layers of width {m.hidden_size}, {m.num_attention_heads} heads "
        f"({m.num_kv_heads} KV) of {m.head_dim}{experts}, vocabulary {m.vocab_size:,}; looped: "
        f"{m.num_loops} loops, window {m.local_window}; {parameters.total / 1e9:.3g}B parameters, "
        f"{parameters.active / 1e9:.3g}B active",
        "step": f"{layout.micro_batches} micro batch(es) of {layout.micro_batch_size} x "
        f"{config.data.sequence_length} tokens on each rank, {layout} ({layout.world_size} "
        f"process(es)), {precision}, recompute "
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
