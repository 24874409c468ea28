"""The layouts that are proven equal to one process; docs/parallelism.md shows the same table.

A layout is named ``PP2 x TP2``: sizes of pipeline (PP), tensor (TP), context (CP), expert (EP) and
expert tensor parallelism (ETP), model chunks per stage (V), and options; what is left of the
processes is data parallel. ``no SP``: sequences stay whole under tensor parallelism.
"""

from typing import Any

from tests.configs import CLP, LOOP2, ONE_LOOP
from tests.distributed.tiny import DENSE, MOE

_PLT3 = {
    "num_loops": 3,
    "normalize_per_loop": True,
    "emb_scale": 0.7,
    "hidden_scale": 0.3,
    "window_keys": 7,
}
_CHANGES: dict[str, dict[str, Any]] = {
    "vanilla": ONE_LOOP,
    "loop-2": ONE_LOOP | LOOP2,
    "CLP": ONE_LOOP | CLP,
    "PLT-2": {},
    "PLT-2 tied": {"tied_embeddings": True},
    "PLT-2 hidden gate": {"gate_use_hidden_states": True},
    "PLT-3": _PLT3,
    "loop-2 shared routing": ONE_LOOP | LOOP2 | {"moe_loop_routing": "shared"},
    "PLT-2 shared routing": {"moe_loop_routing": "shared"},
    "PLT-3 shared routing": _PLT3 | {"moe_loop_routing": "shared"},
}
MODELS = {name: MOE | changes | {"num_layers": 4} for name, changes in _CHANGES.items()} | {
    f"dense {name}": DENSE | changes | {"num_layers": 4}
    for name, changes in _CHANGES.items()
    if "moe_loop_routing" not in changes
}
"""Four layers, four experts; 16 slots, a window of 4 or 7 keys, router losses and biases on."""

TESTED: tuple[tuple[int, str, str, int], ...] = (
    # processes, layout, model, micro batches per rank and step
    (2, "DP2", "PLT-2", 1),
    (2, "overlap", "PLT-3", 2),
    (2, "full", "PLT-3", 2),
    (2, "selective", "PLT-2 hidden gate", 2),
    (2, "PP2", "vanilla", 1),
    (2, "PP2", "vanilla", 8),
    (2, "PP2", "loop-2", 2),
    (2, "PP2", "CLP", 2),
    (2, "PP2", "PLT-2", 2),
    (2, "PP2", "PLT-2", 3),
    (2, "PP2", "PLT-2", 8),
    (2, "PP2", "PLT-2 tied", 2),
    (2, "PP2", "PLT-3", 8),
    (2, "PP2", "dense PLT-3", 5),
    (2, "PP2 x V2", "vanilla", 2),
    (2, "PP2 x V2", "PLT-2 tied", 2),
    (2, "PP2 x V2", "PLT-3", 3),
    (2, "PP2 x full", "PLT-2", 2),
    (2, "PP2 x overlap", "vanilla", 2),
    (2, "PP2 x selective", "PLT-3", 2),
    (2, "TP2", "vanilla", 8),
    (2, "TP2", "PLT-2 tied", 2),
    (2, "TP2", "PLT-2 hidden gate", 1),
    (2, "TP2", "PLT-3", 1),
    (2, "TP2", "dense PLT-2", 2),
    (2, "TP2 x no SP", "dense PLT-2 hidden gate", 2),
    (2, "TP2 x full", "PLT-2", 2),
    (2, "TP2 x selective", "PLT-2 hidden gate", 1),
    (2, "CP2", "vanilla", 2),
    (2, "CP2", "loop-2", 1),
    (2, "CP2", "PLT-2", 8),
    (2, "CP2", "PLT-3", 1),
    (2, "CP2", "dense PLT-2 hidden gate", 2),
    (2, "CP2 x full", "PLT-3", 2),
    (2, "EP2", "vanilla", 1),
    (2, "EP2", "PLT-2", 2),
    (2, "EP2", "PLT-3", 8),
    (2, "EP2 x full", "PLT-2", 2),
    (2, "EP2 x overlap", "PLT-2", 2),
    (2, "ETP2", "PLT-2", 2),
    (2, "TP2 x EP2", "PLT-2", 2),
    (2, "TP2 x ETP2", "PLT-3", 2),
    (2, "CP2 x EP2", "PLT-2", 1),
    (2, "full", "PLT-3 shared routing", 1),
    (2, "PP2 x selective", "PLT-3 shared routing", 2),
    (2, "PP2 x V2 x full", "loop-2 shared routing", 2),
    (2, "TP2 x ETP2", "PLT-3 shared routing", 2),
    (2, "CP2 x EP2", "PLT-2 shared routing", 2),
    (4, "PP4", "vanilla", 1),
    (4, "PP4", "PLT-2", 4),
    (4, "PP4", "PLT-3", 8),
    (4, "PP2 x EP2", "vanilla", 2),
    (4, "PP2 x EP2", "PLT-2", 2),
    (4, "PP2 x EP2 x full", "PLT-3", 8),
    (4, "PP2 x TP2", "PLT-2", 2),
    (4, "PP2 x TP2", "PLT-3", 8),
    (4, "PP2 x TP2 x V2", "PLT-2 tied", 8),
    (4, "PP2 x TP2 x selective", "PLT-2 hidden gate", 2),
    (4, "PP2 x TP2 x no SP", "dense PLT-2 hidden gate", 2),
    (4, "PP2 x TP2 x ETP2", "PLT-2", 2),
    (4, "PP2 x CP2", "PLT-3", 2),
    (4, "PP2 x CP2 x V2", "PLT-2", 4),
    (4, "PP2", "PLT-2 tied", 2),
    (4, "CP2 x EP2", "PLT-2", 2),
    (4, "CP2 x EP2", "PLT-3", 1),
    (4, "TP2 x CP2", "PLT-3", 2),
    (4, "TP2 x CP2 x no SP", "dense PLT-3", 1),
    (4, "TP2 x EP2", "PLT-2", 1),
    (4, "TP2 x overlap", "PLT-2", 2),
    (4, "EP4", "PLT-2", 1),
    (4, "CP4", "PLT-2", 1),
    (4, "EP2 x ETP2", "PLT-2", 2),
    (4, "TP2 x EP2 x ETP2", "PLT-2", 1),
    (4, "TP2 x CP2 x EP2 x ETP2", "PLT-2", 1),
    (4, "PP2 x TP2 x EP2", "PLT-3", 2),
    (4, "PP2 x CP2 x EP2", "PLT-2 tied", 2),
    (4, "PP2 x TP2 x EP2", "PLT-2 shared routing", 2),
    (4, "PP2 x CP2 x full", "PLT-3 shared routing", 2),
    (8, "PP2 x TP2 x CP2 x EP2", "PLT-2", 2),
)

TRAINED: tuple[tuple[int, str, str], ...] = (
    # processes, layout, model: twenty optimizer steps of eight sequences
    (2, "PP2", "PLT-2"),
    (2, "PP2 x V2 x full", "PLT-3"),
    (2, "TP2", "PLT-2"),
    (2, "overlap", "PLT-2 tied"),
    (4, "PP4", "PLT-2 tied"),
    (4, "PP2 x EP2", "PLT-2"),
    (4, "CP2 x EP2", "PLT-3"),
    (4, "TP2 x EP2 x ETP2", "PLT-2"),
    (4, "PP2 x TP2", "dense PLT-3"),
    (2, "TP2 x EP2", "PLT-2 shared routing"),
)

MOVED: dict[str, tuple[tuple[int, str], ...]] = {
    # model: processes and layouts that one run goes through, two steps on each
    "PLT-2": ((1, "DP1"), (2, "EP2"), (2, "PP2"), (2, "TP2"), (4, "PP2 x EP2"), (1, "DP1")),
    "PLT-3": ((4, "CP2 x EP2"), (4, "PP2 x TP2"), (2, "PP2 x V2"), (2, "TP2 x ETP2"), (2, "CP2")),
    "PLT-2 tied": ((4, "PP4"), (1, "DP1"), (2, "PP2"), (2, "TP2 x EP2"), (2, "DP2")),
    "dense PLT-3": ((2, "TP2"), (4, "PP2 x CP2"), (1, "DP1"), (2, "DP2")),
}

_SIZES = {
    "PP": "pipeline_parallel_size",
    "TP": "tensor_parallel_size",
    "CP": "context_parallel_size",
    "EP": "expert_parallel_size",
    "ETP": "expert_tensor_parallel_size",
    "V": "model_chunks_per_stage",
}
_OPTIONS: dict[str, tuple[str, Any]] = {
    "full": ("recompute", "full"),
    "selective": ("recompute", "selective"),
    "overlap": ("overlap_grad_reduce", True),
    "no SP": ("sequence_parallel", False),
}


def parallel_section(layout: str) -> dict[str, Any]:
    """Return the fields of ``parallel`` that a name stands for."""
    section: dict[str, Any] = {}
    for part in layout.split(" x "):
        kind = part.rstrip("0123456789")
        if part in _OPTIONS:
            section.update([_OPTIONS[part]])
        elif kind != "DP":
            section[_SIZES[kind]] = int(part[len(kind) :])
    return section


def changes_for(processes: int, layout: str, micro_batches: int) -> dict[str, Any]:
    """Return the dotted changes of ``tiny_config`` for a layout; two sequences a micro batch."""
    section = parallel_section(layout)
    model_ranks = 1
    for axis in ("PP", "TP", "CP"):
        model_ranks *= section.get(_SIZES[axis], 1)
    copies = processes // model_ranks
    return {
        **{f"parallel__{field}": value for field, value in section.items()},
        "train__global_batch_size": 2 * micro_batches * copies,
        "train__micro_batch_size": 2,
    }


def table() -> str:
    """Return the table of docs/parallelism.md; running this module prints it."""
    rows: dict[tuple[int, str], list[str]] = {}
    for processes, layout, model, micro_batches in TESTED:
        rows.setdefault((processes, layout), []).append(f"{model} ({micro_batches})")
    lines = ["| processes | layout | model (micro batches) |", "|---|---|---|"]
    lines += [f"| {n} | {layout} | {', '.join(models)} |" for (n, layout), models in rows.items()]
    return "\n".join(lines)


def trained_table() -> str:
    """Return the table of whole runs in docs/parallelism.md."""
    lines = ["| processes | layout | model |", "|---|---|---|"]
    return "\n".join(lines + [f"| {n} | {layout} | {model} |" for n, layout, model in TRAINED])


def moved_table() -> str:
    """Return the table of runs that change their layout in docs/parallelism.md."""
    lines = ["| model | layouts, one after another |", "|---|---|"]
    for model, journey in MOVED.items():
        layouts = (f"{name} ({n})" for n, name in journey)
        lines.append(f"| {model} | {' → '.join(layouts)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(), trained_table(), moved_table(), sep="\n\n")
