"""One Markdown report about several runs: what they are, cost and reach, and what was not done."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

from pltmoe.config import config_to_dict
from pltmoe.config.counts import count_parameters, kv_cache_bytes
from pltmoe.errors import DataError
from pltmoe.reports import numbers
from pltmoe.reports.plots import Bars, plot_costs, plot_heat_maps, plot_losses
from pltmoe.reports.runs import Run
from pltmoe.tracking.mlflow import flatten

REPORT_FILE = "report.md"
_FINAL_LINES = 5
"""Logged steps that the final training loss is the mean of."""
_CACHE_ELEMENT_BYTES = 2
_NOT_A_DIFFERENCE = ("name", "train.output_dir", "tracking.", "checkpoint.")


@dataclass(frozen=True)
class Extras:
    """What other tools measured, by run name."""

    decode: dict[str, dict[str, Any]] = field(default_factory=dict)
    """``ms_per_token``, ``batch``, ``context``, ``device``, ``command`` of a decode benchmark."""
    generated: list[dict[str, str]] = field(default_factory=list)
    """``prompt`` and ``text`` of continuations."""


def write_report(runs: Sequence[Run], folder: Path, title: str, extras: Extras) -> Path:
    """Write report.md, its pictures and their CSVs into ``folder``; return the report's path.

    Raises:
        DataError: two runs of one name, no training loss, or an unusable decode file.
    """
    _check(runs, extras)
    folder.mkdir(parents=True, exist_ok=True)
    plot_losses(runs, folder / "loss.png", title)
    heat_rows = plot_heat_maps(runs, folder / "loops.png")
    plot_costs([run.name for run in runs], _bars(runs, extras), folder / "cost.png")
    parts = [
        f"# {title}",
        _what_was_run(runs),
        _results(runs, extras),
        "![Training and validation loss](loss.png)",
        "![Validation loss, cache and decode time](cost.png)",
        _loops(has_heat_maps=len(heat_rows) > 1),
        _differences(runs),
        _samples(extras.generated),
        _limits(runs, extras),
        _files(runs, has_heat_maps=len(heat_rows) > 1),
    ]
    path = folder / REPORT_FILE
    new = path.with_name(path.name + ".new")
    new.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")
    new.replace(path)
    return path


def read_decode(path: Path) -> dict[str, dict[str, Any]]:
    """Read the JSON of a decode benchmark: run name -> measurement.

    Raises:
        DataError: unreadable, or an entry without a number ``ms_per_token``.
    """
    tree = _read_json(path)
    if not isinstance(tree, dict):
        raise DataError(f'{path}: expected {{"run name": {{"ms_per_token": ...}}}}')
    for name, entry in tree.items():
        if not isinstance(entry, dict) or not isinstance(entry.get("ms_per_token"), int | float):
            raise DataError(f"{path}: '{name}' has no number ms_per_token; measure it again")
    return tree


def read_generated(path: Path) -> list[dict[str, str]]:
    """Read the JSON list of prompts and texts that tools/generate.py writes.

    Raises:
        DataError: unreadable, or not such a list.
    """
    samples = _read_json(path)
    if not isinstance(samples, list) or not all(
        isinstance(s, dict) and {"prompt", "text"} <= s.keys() for s in samples
    ):
        raise DataError(f'{path}: not a list of samples, [{{"prompt": ..., "text": ...}}, ...]')
    return samples


def final_loss(run: Run) -> float:
    """Return the training loss, mean of the last logged steps (one step alone is noisy)."""
    return fmean(point.value for point in run.series("train/loss")[-_FINAL_LINES:])


def tokens_per_second(run: Run) -> float | None:
    """Return the median throughput of all ranks together, without the first logged line."""
    values = [point.value for point in run.series("perf/tokens_per_second")]
    return median(values[1:] or values) if values else None


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON ({error}); make it again") from None


def _check(runs: Sequence[Run], extras: Extras) -> None:
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            both = " and ".join(r.source for r in runs if r.name == run.name)
            raise DataError(f"{both} have the same name '{run.name}': give each run its own name")
        if not run.series("train/loss"):
            raise DataError(f"{run.source}: no train/loss was logged")
    if unknown := set(extras.decode) - set(names):
        raise DataError(f"decode times of {sorted(unknown)}, but the runs are {sorted(names)}")


def _what_was_run(runs: Sequence[Run]) -> str:
    rows = [["run", "model", "steps", "tokens", "device", "layout", "precision", "commit", "ended"]]
    for run in runs:
        steps = f"{run.last_step:,} of {run.config.train.steps:,}"
        facts = [run.tag(name) or "unknown" for name in ("device", "layout", "precision", "commit")]
        facts[3] = f"`{facts[3][:12]}`"
        tokens = numbers.count(run.tokens)
        ended = "unknown" if run.status is None else run.status
        ended = "no end recorded" if ended == "RUNNING" else ended  # running, or killed since
        rows.append([run.name, _model(run), steps, tokens, *facts, ended])
    return "## What was run\n\n" + _markdown(rows, left=9)


def _model(run: Run) -> str:
    m = run.config.model
    kind = f"{m.num_experts} experts, top-{m.moe_top_k}" if m.is_moe else "dense"
    words = [
        f"{m.num_loops} x {m.num_layers} layers" if m.num_loops > 1 else f"{m.num_layers} layers"
    ]
    flags = {"shift": m.cross_loop_shift, "shared KV": m.share_first_loop_kv, "G-SWA": m.gated_swa}
    words += [name for name, on in flags.items() if on]
    words += ["norm per loop"] if m.normalize_per_loop else []
    return ", ".join([*words, kind])


def _results(runs: Sequence[Run], extras: Extras) -> str:
    rows = [["", *(run.name for run in runs)]]
    counts = [count_parameters(run.config.model) for run in runs]
    rows.append(["parameters", *(numbers.count(c.total) for c in counts)])
    rows.append(["active per token", *(numbers.count(c.active) for c in counts)])
    rows.append(["training compute per token", *(numbers.flops(r.flops_per_token) for r in runs)])
    total = (numbers.flops(run.tokens * run.flops_per_token) for run in runs)
    rows.append(["training compute", *total])
    lines = f"training loss (mean of the last {_FINAL_LINES} logged steps)"
    rows.append([lines, *(f"{final_loss(run):.4f}" for run in runs)])
    rows.append(["**validation loss** (at step)", *(_valid(run) for run in runs)])
    speeds = [tokens_per_second(run) for run in runs]
    rows.append(
        ["training tokens/s", *("not logged" if s is None else f"{s:,.0f}" for s in speeds)]
    )
    rows += [_cache_row(runs), *_decode_rows(runs, extras)]
    return "## Results\n\n" + _markdown(rows)


def _valid(run: Run) -> str:
    points = run.series("valid/loss")
    return f"**{points[-1].value:.4f}** ({points[-1].step:,})" if points else "not validated"


def _cache_row(runs: Sequence[Run]) -> list[str]:
    context = max(run.config.data.sequence_length for run in runs)
    sizes = [_cache_bytes(run, context) for run in runs]
    cells = [f"{numbers.size_in_bytes(s)} ({s / sizes[0]:.2f}x)" for s in sizes]
    return [f"KV cache per sequence of {context:,} tokens, 2 bytes a value (computed)", *cells]


def _decode_rows(runs: Sequence[Run], extras: Extras) -> list[list[str]]:
    if not extras.decode:
        return [["decode ms per token", *("not measured" for _ in runs)]]
    cells, caches = ["decode ms per token (measured)"], ["KV cache per sequence (measured)"]
    for run in runs:
        entry = extras.decode.get(run.name)
        cells.append(f"{entry['ms_per_token']:.2f}" if entry else "not measured")
        size = entry.get("cache_bytes_per_sequence") if entry else None
        at = [f"{entry['context']:,} tokens"] if entry and "context" in entry else []
        at += [entry["dtype"]] if entry and "dtype" in entry else []
        note = f" ({', '.join(at)})" if at else ""
        caches.append(numbers.size_in_bytes(size) + note if size else "not measured")
    return [caches, cells] if any(c != "not measured" for c in caches[1:]) else [cells]


def _cache_bytes(run: Run, context: int) -> int:
    return kv_cache_bytes(run.config.model, context, _CACHE_ELEMENT_BYTES)


def _bars(runs: Sequence[Run], extras: Extras) -> list[Bars]:
    valid = [run.series("valid/loss") for run in runs]
    context = max(run.config.data.sequence_length for run in runs)
    decode = [extras.decode.get(run.name, {}).get("ms_per_token") for run in runs]
    last = [points[-1].value if points else None for points in valid]
    caches = [_cache_bytes(run, context) / 1024 for run in runs]
    return [
        Bars("Validation loss (nats per token)", last, from_zero=False),
        Bars(f"KV cache, {context:,} tokens (KiB)", caches),
        Bars("Decoding (ms per token)", decode),
    ]


def _loops(has_heat_maps: bool) -> str:
    if not has_heat_maps:
        return ""
    return (
        "## Loops and layers\n\n"
        "Load imbalance is the busiest expert's tokens over the mean of all experts. Overlap is "
        "the share of the experts of loop 1 that a later loop picks again for the same slot. The "
        "gate is the weight of the local window in G-SWA; it starts at 0.5.\n\n"
        "![Per loop and layer](loops.png)"
    )


def _differences(runs: Sequence[Run]) -> str:
    flat = [flatten(config_to_dict(run.config)) for run in runs]
    keys = sorted({key for tree in flat for key in tree})
    rows = [["setting", *(run.name for run in runs)]]
    for key in keys:
        values = [tree.get(key, "absent") for tree in flat]
        if len(set(values)) > 1 and not key.startswith(_NOT_A_DIFFERENCE):
            rows.append([f"`{key}`", *values])
    if len(runs) == 1:
        return ""
    head = "## Where the configurations differ\n\n"
    return head + (_markdown(rows) if len(rows) > 1 else "Nowhere but in their names.")


def _samples(generated: Sequence[dict[str, str]]) -> str:
    if not generated:
        return ""
    blocks = []
    for sample in generated:
        model = f" ({sample['model']})" if "model" in sample else ""
        text = sample["prompt"] + sample["text"]
        fence = "````" if "```" in text else "```"
        prompt = sample["prompt"].splitlines()[0]
        blocks.append(f"Prompt `{prompt}`{model}:\n\n{fence}text\n{text.rstrip()}\n{fence}")
    return "## Text it writes\n\n" + "\n\n".join(blocks)


def _limits(runs: Sequence[Run], extras: Extras) -> str:
    """What the numbers do not say, stated from the runs themselves."""
    said = [_unfinished(runs), _devices(runs), _equal_tokens(runs), _seeds(runs)]
    said += [_decode_statement(runs, extras)]
    missing = [run.name for run in runs if not run.series("valid/loss")]
    said.append(f"Not validated: {', '.join(missing)}." if missing else "")
    said.append(
        "No benchmark of knowledge or reasoning was run; loss is all that is compared here."
    )
    return "## What this does and does not show\n\n" + "\n".join(f"- {s}" for s in said if s)


def _unfinished(runs: Sequence[Run]) -> str:
    short = [run for run in runs if run.last_step < run.config.train.steps]
    if not short:
        return "All runs did all their steps."
    parts = (f"{r.name} ({r.last_step:,} of {r.config.train.steps:,} steps)" for r in short)
    return f"**Not finished:** {', '.join(parts)}."


def _devices(runs: Sequence[Run]) -> str:
    devices = {run.tag("device") or "an unknown device" for run in runs}
    text = f"Trained on {' and '.join(sorted(devices))}."
    if all(device.startswith("CPU") for device in devices):
        text += " No GPU was used: speeds and times here say nothing about a GPU."
    return text


def _equal_tokens(runs: Sequence[Run]) -> str:
    if len({run.tokens for run in runs}) == 1:
        return f"Every run saw {runs[0].tokens:,} tokens." if len(runs) > 1 else ""
    parts = ", ".join(f"{run.name} {run.tokens:,}" for run in runs)
    return f"The runs saw different numbers of tokens ({parts}): compare curves, not final values."


def _seeds(runs: Sequence[Run]) -> str:
    seeds = sorted({run.config.train.seed for run in runs})
    return (
        f"One run each (seed {', '.join(map(str, seeds))}): a difference as small as that between "
        "two seeds is not a result."
    )


def _decode_statement(runs: Sequence[Run], extras: Extras) -> str:
    measured = [run for run in runs if run.name in extras.decode]
    if not measured:
        return "Decoding was not measured."
    entry = extras.decode[measured[0].name]
    text = f"Decode times: {entry.get('device', 'unknown device')}, batch {entry.get('batch', '?')}"
    text += f", context {entry.get('context', '?')}"
    if command := entry.get("command"):
        text += f", by `{command}`"
    text += "."
    if "benchmark_decode" in (command or "") and any(
        r.config.model.num_loops > 1 for r in measured
    ):
        text += (
            " The loops ran one after another there; one forward pass for all loops of a token, "
            "which the cross-loop shift makes possible, is not what was timed."
        )
    return text


def _files(runs: Sequence[Run], has_heat_maps: bool) -> str:
    names = ["loss", "cost", *(["loops"] if has_heat_maps else [])]
    listed = ", ".join(f"[{name}.csv]({name}.csv)" for name in names)
    sources = "\n".join(f"- {run.name}: `{run.source}`" for run in runs)
    return (
        f"## Where the numbers come from\n\nBehind the pictures: {listed}. The runs:\n\n{sources}"
    )


def _markdown(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Return a table; the first ``left`` columns are set left, the others right."""
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(3, *(len(row[i]) for row in cells)) for i in range(len(cells[0]))]
    rule = ["-" * w if i < left else "-" * (w - 1) + ":" for i, w in enumerate(widths)]

    def line(row: Sequence[str]) -> str:
        padded = (
            c.ljust(w) if i < left else c.rjust(w)
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        )
        return f"| {' | '.join(padded)} |"

    return "\n".join([line(cells[0]), line(rule), *(line(row) for row in cells[1:])])
