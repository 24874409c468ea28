"""A plan as text for people, as JSON for programs, and the page docs/plan.md."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

from pltmoe.config import RunConfig, deepspeed
from pltmoe.config.counts import count_parameters
from pltmoe.errors import ConfigError
from pltmoe.parallel.layout import layout_for
from pltmoe.plan.machines import DEFAULT, GIB, Assumptions
from pltmoe.plan.planner import Plan, make_plan
from pltmoe.plan.search import Candidate

_GB = 1e9


def as_text(plan: Plan) -> str:
    """Return everything about one plan, in a terminal's width."""
    layout, full, config = plan.layout, plan.fullest, plan.config
    count = count_parameters(config.model)
    lines = [
        f"{config.name}: {count.total / 1e9:.2f} B parameters, {count.active / 1e9:.2f} B active, "
        f"{config.model.num_loops} loop(s), sequences of {config.data.sequence_length}",
        f"engine        {config.engine}{_ABOUT_ENGINE[config.engine](config)}",
        f"layout        {layout} on {layout.world_size} x {plan.gpu.name}, "
        f"{layout.model_chunks_per_stage} model chunk(s) per stage, "
        f"sequence parallel {'on' if layout.sequence_parallel else 'off'}, "
        f"recompute {config.parallel.recompute}",
        f"batch         {layout.global_batch_size} sequences = {layout.micro_batches} micro "
        f"batch(es) of {layout.micro_batch_size} on each of {layout.data_parallel_size} ranks",
        "",
        f"memory per GPU, GiB, stage {full.stage} (the fullest of {len(plan.stages)}), "
        f"{full.loop_chunks_alive} loop chunk(s) under way",
        *_memory_lines(plan),
        "",
        "sent per GPU and step, GB",
        *_message_lines(plan),
        "",
        *_time_lines(plan),
    ]
    return "\n".join(lines)


def _zero(config: RunConfig) -> str:
    """Name the ZeRO stage, and what these numbers do not know about it."""
    stage, device = deepspeed.zero_stage(config), deepspeed.offload_device(config)
    unknown = [f"an optimizer offloaded to {device}"] if device else []
    unknown += ["gradients sent for every micro batch"] if stage >= 2 else []
    unknown += ["weights gathered in every pass"] if stage == 3 else []
    return f", ZeRO stage {stage}" + (f"; times leave out {', '.join(unknown)}" if unknown else "")


_ABOUT_ENGINE: dict[str, Callable[[RunConfig], str]] = {
    "megatron": lambda c: "",
    "deepspeed": _zero,
}


def _memory_lines(plan: Plan) -> Iterator[str]:
    full = plan.fullest
    for name, size in full.parts.items():
        yield _row(name, size / GIB)
        if name == "activations" and not size:
            yield "    (the peak is in the optimizer's update: activations are free by then)"
        elif name == "activations":
            yield _row("  of it K/V for later loops", full.shared_kv / GIB)
            yield _row("  of it gradients lent back", full.lent_gradients / GIB)
            yield _row("  of it router and dispatch", full.dispatch / GIB)
            yield _row("  of it logits, cross entropy", full.logits / GIB)
    yield _row("peak", full.peak / GIB)
    says = "fits" if plan.fits else "DOES NOT FIT"
    yield _row("usable", plan.usable / GIB) + f"   {says}"


def _message_lines(plan: Plan) -> Iterator[str]:
    for m in plan.messages:
        seconds = m.seconds(plan.gpu, plan.assumptions)
        where = "crosses nodes" if m.between else "inside a node"
        inside, between = m.inside / _GB, m.between / _GB
        yield (
            f"  {m.kind:<28}{m.total / _GB:10.2f}   NVLink {inside:.2f}, network {between:.2f}: "
            f"{where}, {seconds:.3f} s"
        )
    if not plan.messages:
        yield "  none"


def _time_lines(plan: Plan) -> Iterator[str]:
    yield f"FLOPs per step       {plan.flops_per_step:.3e}"
    yield f"bubble               {plan.bubble:.1%}"
    yield (
        f"expected step        {plan.step_seconds:.2f} s = arithmetic {plan.compute_seconds:.2f} + "
        f"messages {plan.message_seconds:.2f}, over 1 - bubble; + gradients and weights "
        f"{plan.data_seconds:.2f} + optimizer {plan.optimizer_seconds:.3f}"
    )
    yield f"expected MFU         {plan.mfu:.1%}, {plan.tokens_per_second:,.0f} tokens/s"
    a = plan.assumptions
    yield (
        f"assumed, not measured: dense {a.dense_efficiency:g}, attention "
        f"{a.attention_efficiency:g} of the peak, experts the less the fewer tokens each has; "
        f"NVLink {a.nvlink_efficiency:g} of "
        f"{plan.gpu.nvlink / _GB:g} GB/s, network {a.network_efficiency:g} of "
        f"{a.network / _GB:g} GB/s; fullest experts {a.expert_load:g} x the mean"
    )
    if plan.config.train.precision == "fp8":
        yield "not counted: that products in FP8 are faster; memory is that of FP8"


def _row(name: str, value: float) -> str:
    return f"  {name:<28}{value:10.2f}"


def as_json(plan: Plan) -> dict[str, Any]:
    """Return the plan's numbers; bytes and seconds."""
    full, layout = plan.fullest, plan.layout
    return {
        "name": plan.config.name,
        "gpus": layout.world_size,
        "gpu": plan.gpu.name,
        "layout": str(layout),
        "micro_batches": layout.micro_batches,
        "fits": plan.fits,
        "stage": full.stage,
        "usable_bytes": plan.usable,
        "peak_bytes": full.peak,
        "bytes": full.parts,
        "shared_kv_bytes": full.shared_kv,
        "lent_gradient_bytes": full.lent_gradients,
        "dispatch_bytes": full.dispatch,
        "logits_bytes": full.logits,
        "sent_bytes": {m.kind: {"nvlink": m.inside, "network": m.between} for m in plan.messages},
        "bubble": plan.bubble,
        "flops_per_step": plan.flops_per_step,
        "step_seconds": plan.step_seconds,
        "mfu": plan.mfu,
        "tokens_per_second": plan.tokens_per_second,
    }


def search_table(found: Sequence[tuple[Candidate, Plan]], rows: int) -> str:
    """Return the first layouts as a table."""
    head = (
        "TP",
        "PP",
        "v",
        "CP",
        "EP",
        "ETP",
        "recompute",
        "micro",
        "peak GiB",
        "bubble",
        "step s",
    )
    widths = (3, 3, 2, 3, 4, 4, 10, 6, 9, 7, 9)
    lines = ["".join(f"{name:>{w}}" for name, w in zip(head, widths, strict=True)) + "    MFU"]
    for c, plan in found[:rows]:
        cells = [str(value) for value in c.__dict__.values()]
        cells += [
            f"{plan.fullest.peak / GIB:.1f}",
            f"{plan.bubble:.1%}",
            f"{plan.step_seconds:.2f}",
        ]
        line = "".join(f"{cell:>{w}}" for cell, w in zip(cells, widths, strict=True))
        lines.append(f"{line}{plan.mfu:>7.1%}")
    return "\n".join(lines)


def page(configs: Sequence[RunConfig], sizes: Sequence[int], gpu: str, command: str) -> str:
    """Return docs/plan.md: every configuration on every number of GPUs."""
    a = DEFAULT
    lines = [_INTRODUCTION.format(command=command, gpu=gpu), *_assumption_rows(a)]
    for config in configs:
        count = count_parameters(config.model)
        lines += [
            f"\n## {config.name}\n",
            f"{count.total / 1e9:.2f} B parameters, {count.active / 1e9:.2f} B active per token, "
            f"{config.model.num_loops} loop(s), sequences of {config.data.sequence_length}, global "
            f"batch {config.train.global_batch_size}.\n",
            "| GPUs | layout | micro batches | parameters | gradients | optimizer | activations | "
            "working | **peak GiB** | fits | sent over NVLink GB | over network GB | bubble | "
            "step s | MFU |",
            "|---:|---|---:|---:|---:|---:|---:|---:|---:|---|---:|---:|---:|---:|---:|",
        ]
        lines += [_page_row(config, size, gpu) for size in sizes]
    return "\n".join(lines) + "\n"


def _page_row(config: RunConfig, gpus: int, gpu: str) -> str:
    plan = make_plan(_that_divides(config, gpus), gpus, gpu)
    full, layout = plan.fullest, plan.layout
    parts = " | ".join(f"{size / GIB:.1f}" for size in full.parts.values())
    inside = sum(m.inside for m in plan.messages) / _GB
    between = sum(m.between for m in plan.messages) / _GB
    fits = "yes" if plan.fits else "**no**"
    return (
        f"| {gpus} | {layout} | {layout.micro_batches} x {layout.micro_batch_size} | {parts} | "
        f"**{full.peak / GIB:.1f}** | {fits} | {inside:.1f} | {between:.1f} | {plan.bubble:.1%} | "
        f"{plan.step_seconds:.2f} | {plan.mfu:.1%} |"
    )


def _that_divides(config: RunConfig, gpus: int) -> RunConfig:
    """Return ``config`` with the largest micro batch, up to its own, that the GPUs can share."""
    for micro in range(config.train.micro_batch_size, 1, -1):
        train = config.train.model_copy(update={"micro_batch_size": micro})
        changed = config.model_copy(update={"train": train})
        with suppress(ConfigError):
            layout_for(changed, gpus)
            return changed
    train = config.train.model_copy(update={"micro_batch_size": 1})
    return config.model_copy(update={"train": train})


def _assumption_rows(a: Assumptions) -> list[str]:
    return [
        "| assumed, not measured | |",
        "|---|---:|",
        f"| dense matrix products, share of the bf16 peak | {a.dense_efficiency:g} |",
        f"| tokens at which an expert reaches half of that | {a.expert_half_tokens} |",
        f"| attention scores and window | {a.attention_efficiency:g} |",
        f"| NVLink, share of its bandwidth (nodes of {a.gpus_per_node}) | "
        f"{a.nvlink_efficiency:g} |",
        f"| network, share of {a.network / _GB:g} GB/s per GPU | {a.network_efficiency:g} |",
        f"| memory bandwidth in the optimizer | {a.memory_efficiency:g} |",
        f"| tokens of the fullest rank's experts over the mean | {a.expert_load:g} |",
        f"| memory for CUDA, NCCL and cuBLAS, GiB | {a.context_gib:g} |",
        f"| memory lost to fragmentation | {a.fragmentation:g} |",
    ]


_INTRODUCTION = """# What the paper's models need

Planned, not run. Every number follows from the configuration by formulas (`pltmoe/plan/`). The
bytes of parameters, gradients, optimizer state and activations are held against real allocations
of small models on a CPU, under each kind of parallelism, within 5 % (`tests/unit/plan/`,
`tests/distributed/test_plan.py`). What a backward pass needs on top for a moment is an estimate:
small models needed 0.6 to 1.05 of the peak that is planned. Times rest on the assumed efficiencies
below: they tell layouts apart and do not predict hours. Kernels on a GPU keep other tensors than
those on a CPU; what is known of that is in `pltmoe/plan/activations.py`, and has not been measured.

This page is what this command writes, and a test compares:

```bash
{command}
```

Layouts are those of the files under `configs/`, on {gpu} GPUs, with the file's micro batch or,
where the global batch does not divide, the next smaller one; `python tools/plan.py --search` looks
for better ones. Memory is in GiB per GPU of the fullest stage at the worst moment of a step; where
that is the update (PyTorch's AdamW; Transformer Engine's needs less), activations are 0. To save,
Megatron gathers the optimizer state of each bucket on the GPU; in host memory a rank that writes
holds the state of all its parameters twice for a moment (26 bytes per parameter in bf16), then 14
bytes while it writes in the background, and every rank 19 while it loads (measured on a CPU). For
plt-1.7b-40b with EP8 that is 130, 70 and 95 GiB a rank, and the eight ranks that write are those
of one node. Bytes sent are per GPU and step. Expert-parallel groups of 8 stay inside a node;
reducing gradients and gathering weights cross nodes from 16 GPUs on.
"""
