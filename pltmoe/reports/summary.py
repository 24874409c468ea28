"""One Markdown report about several runs: what they are, cost and reach, and what was not done."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pltmoe.config import config_to_dict
from pltmoe.config.describe import describe_model
from pltmoe.errors import DataError
from pltmoe.reports import numbers, paper
from pltmoe.reports.curves import DIAGNOSTICS, ROUTING, SPEED, plot_curves
from pltmoe.reports.done import what_was_done
from pltmoe.reports.glance import Extras, at_a_glance, cache_bytes, in_a_line, longest_context
from pltmoe.reports.heat_maps import plot_heat_maps
from pltmoe.reports.markdown import table
from pltmoe.reports.plots import Bars, plot_costs, plot_losses, plot_scores
from pltmoe.reports.runs import Run
from pltmoe.reports.scores import common_tasks, unlike_tasks
from pltmoe.tracking.mlflow import flatten

REPORT_FILE = "report.md"
_PICTURES = ("loss", "cost", "speed", "routing", "loops", "diagnostics", "scores")
_NOT_A_DIFFERENCE = ("name", "train.output_dir", "tracking.", "checkpoint.")


def write_report(runs: Sequence[Run], folder: Path, title: str, extras: Extras) -> Path:
    """Write report.md, its pictures and their CSVs into ``folder``; return the report's path.

    Runs have names of their own (``tell_apart``).

    Raises:
        DataError: two runs of one name, no training loss, or measurements of unknown runs.
    """
    _check(runs, extras)
    folder.mkdir(parents=True, exist_ok=True)
    for old in report_files(folder):  # an earlier report may have had more pictures
        old.unlink()
    parts = [
        f"# {title}",
        table(at_a_glance(runs, extras)),
        what_was_done(runs, extras),
        _what_was_run(runs),
        _loss_section(runs, folder, title),
        _cost_section(runs, folder, extras),
        _loops_section(runs, folder),
        _diagnostics_section(runs, folder),
        _scores_section(runs, folder, extras),
        _differences(runs),
        _samples(extras.generated),
        _files(runs, folder),
    ]
    path = folder / REPORT_FILE
    new = path.with_name(path.name + ".new")
    text = "\n\n".join(part for part in parts if part) + "\n"
    new.write_text(text, encoding="utf-8", errors="backslashreplace")  # a path may be no UTF-8
    new.replace(path)
    return path


def tell_apart(runs: Sequence[Run]) -> list[Run]:
    """Give runs of one name, such as seeds of one preset, the shortest ends of their paths.

    The others keep their names. A run that is given twice keeps its name as well: ``write_report``
    refuses it.
    """
    names = [run.name for run in runs]
    told = list(runs)
    for name in {name for name in names if names.count(name) > 1}:
        same = [i for i, other in enumerate(names) if other == name]
        paths = [Path(runs[i].source).absolute().parts for i in same]
        for length in range(1, max(map(len, paths)) + 1):
            tails = ["/".join(path[-length:]) for path in paths]
            if len({*tails, *names}) == len(tails) + len({*names}):
                for i, tail in zip(same, tails, strict=True):
                    config = runs[i].config.model_copy(update={"name": tail})
                    told[i] = replace(runs[i], config=config)
                break
    return told


def note(runs: Sequence[Run], extras: Extras) -> str:
    """Return the short form: one line, the table, and what it may not be taken for.

    MLflow shows a description folded to its first line.
    """
    rows = table(at_a_glance(runs, extras))
    return f"{in_a_line(runs, extras)}\n\n{rows}\n\n{paper.statement(runs)}"


def report_files(folder: Path) -> list[Path]:
    """Return what ``write_report`` has written into a folder: Markdown, pictures, CSVs."""
    drawn = (folder / f"{name}{kind}" for name in _PICTURES for kind in (".png", ".csv"))
    return [path for path in (folder / REPORT_FILE, *drawn) if path.exists()]


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
            raise DataError(f"{both} have the same name '{run.name}': name each run once")
        if not run.series("train/loss"):
            raise DataError(f"{run.source}: no train/loss was logged")
    for what, known in (("decode times", extras.decode), ("scores", extras.evaluations)):
        if unknown := set(known) - set(names):
            raise DataError(f"{what} of {sorted(unknown)}, but the runs are {sorted(names)}")


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
    return head + (table(rows) if len(rows) > 1 else "Nowhere but in their names.")


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


def _what_was_run(runs: Sequence[Run]) -> str:
    rows = [["run", "model", "steps", "tokens", "device", "layout", "precision", "commit", "ended"]]
    for run in runs:
        steps = f"{run.last_step:,} of {run.config.train.steps:,}"
        facts = [run.tag(name) or "unknown" for name in ("device", "layout", "precision", "commit")]
        facts[3] = f"`{facts[3][:12]}`"
        tokens = numbers.count(run.tokens)
        ended = "unknown" if run.status is None else run.status
        ended = "no end recorded" if ended == "RUNNING" else ended  # running, or killed since
        rows.append([run.name, describe_model(run.config.model), steps, tokens, *facts, ended])
    return "## The runs\n\n" + table(rows, left=9)


def _loss_section(runs: Sequence[Run], folder: Path, title: str) -> str:
    plot_losses(runs, folder / "loss.png", title)
    return "## Loss\n\n![Training and validation loss](loss.png)"


def _cost_section(runs: Sequence[Run], folder: Path, extras: Extras) -> str:
    plot_costs([run.name for run in runs], _bars(runs, extras), folder / "cost.png")
    parts = ["## Cost", "![Validation loss, cache and decode time](cost.png)"]
    if plot_curves(runs, SPEED, folder / "speed.png", "Speed and memory while training"):
        parts.append("![Throughput, MFU and memory over the training](speed.png)")
    else:
        parts.append("Speed and memory of the training: not run (nothing was logged).")
    return "\n\n".join(parts)


def _bars(runs: Sequence[Run], extras: Extras) -> list[Bars]:
    valid = [run.series("valid/loss") for run in runs]
    context = longest_context(runs)
    decode = [extras.decode.get(run.name, {}).get("ms_per_token") for run in runs]
    last = [points[-1].value if points else None for points in valid]
    caches = [cache_bytes(run, context) / 1024 for run in runs]
    return [
        Bars("Validation loss (nats per token)", last, from_zero=False),
        Bars(f"KV cache, {context:,} tokens (KiB)", caches),
        Bars("Decoding (ms per token)", decode),
    ]


def _loops_section(runs: Sequence[Run], folder: Path) -> str:
    drawn = plot_curves(runs, ROUTING, folder / "routing.png", "Routing and gates, mean of layers")
    maps = plot_heat_maps(runs, folder / "loops.png")
    if not drawn and not maps:
        return "## Experts and gates\n\nNot run: no routing and no gates were logged."
    text = (
        "## Experts and gates\n\n"
        "Balance is the busiest expert's tokens over the mean of all experts. Overlap is "
        "the share of the experts of loop 1 that a later loop picks again for the same slot. The "
        "gate is the weight of the local window in G-SWA; it starts at 0.5."
    )
    if drawn:
        text += "\n\n![Balance, overlap and gates over the training](routing.png)"
    return text + ("\n\n![Per loop and layer](loops.png)" if maps else "")


def _diagnostics_section(runs: Sequence[Run], folder: Path) -> str:
    head = "## What the loops do\n\n"
    title = "What the loops do to the hidden states"
    if not plot_curves(runs, DIAGNOSTICS, folder / "diagnostics.png", title):
        looped = any(run.config.model.num_loops > 1 for run in runs)
        return head + ("Not run: nothing was logged." if looped else "No run has several loops.")
    return head + (
        "H(l) is the output of the stack in loop l, before any norm; u(l) = H(l) - H(l-1) is the "
        "loop's update, slot by slot. A small update changes little, however much it costs. Its "
        "cosine to H(l-1) is below 0 where the loop takes back, about 0 where it adds something "
        "new, above 0 where it enlarges what is there; a cosine near -1 to the update before "
        "means that loops undo each other. Loop l+1 gets h[i-1] of the slot before instead of "
        "the slot's own h[i]: the further apart they are, the more the one-slot shift costs. "
        "LoopCoder-v2 found its gains to end after loop 2.\n\n"
        "![Loop diagnostics](diagnostics.png)"
    )


def _scores_section(runs: Sequence[Run], folder: Path, extras: Extras) -> str:
    head = "## Benchmark scores\n\n"
    if not extras.evaluations:
        return head + "Not run for any of the runs (tools/evaluate.py runs them)."
    tasks = list(dict.fromkeys(t for e in extras.evaluations.values() for t in e.tasks))
    rows = [["task", "metric", "shots", *(run.name for run in runs)]]
    for task in tasks:
        known = [e.tasks[task] for e in extras.evaluations.values() if task in e.tasks]
        metrics = _distinct(score.metric for score in known)
        shots = _distinct("not stated" if s.shots is None else str(s.shots) for s in known)
        rows.append([task, metrics, shots, *(_score(r, task, extras) for r in runs)])
    common = common_tasks(list(extras.evaluations.values()))
    if common:
        cells = [_average(run, common, extras) for run in runs]
        rows.append([f"**mean of {len(common)}**", "", "", *cells])
        labels = [run.name for run in runs if run.name in extras.evaluations]
        values = [[extras.evaluations[n].tasks[t] for t in common] for n in labels]
        colours = [i for i, run in enumerate(runs) if run.name in extras.evaluations]
        plot_scores(common, labels, values, colours, folder / "scores.png")
    sources = "\n".join(f"- {name}: `{e.source}`" for name, e in extras.evaluations.items())
    picture = "\n\n![Benchmark scores](scores.png)" if common else ""
    unlike = unlike_tasks(list(extras.evaluations.values()))
    warning = (
        f"\n\n**Not comparable: {', '.join(unlike)}.** The models were not asked alike (shots or "
        "metric); these scores are in no average."
    )
    return f"{head}{table(rows)}{warning if unlike else ''}{picture}\n\nFrom:\n\n{sources}"


def _distinct(values: Iterable[str]) -> str:
    """Return what the evaluated models have, once if it is the same."""
    return " / ".join(dict.fromkeys(values))


def _average(run: Run, tasks: Sequence[str], extras: Extras) -> str:
    found = extras.evaluations.get(run.name)
    return f"**{found.average(tasks):.1f}**" if found else "not run"


def _score(run: Run, task: str, extras: Extras) -> str:
    found = extras.evaluations.get(run.name)
    if found is None or task not in found.tasks:
        return "not run"
    score = found.tasks[task]
    scale, digits = (100.0, 1) if score.is_share else (1.0, 3)
    error = "" if score.error is None else f" ± {score.error * scale:.{digits}f}"
    return f"{score.value * scale:.{digits}f}{error}"


def _files(runs: Sequence[Run], folder: Path) -> str:
    listed = ", ".join(
        f"[{path.name}]({path.name})" for path in report_files(folder) if path.suffix == ".csv"
    )
    sources = "\n".join(f"- {run.name}: `{run.source}`" for run in runs)
    return (
        f"## Where the numbers come from\n\nBehind the pictures: {listed}. The runs:\n\n{sources}"
    )
