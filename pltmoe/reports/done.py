"""What was run and what was not, said plainly: a table of parts and runs, then sentences."""

from collections.abc import Callable, Sequence

from pltmoe.reports import paper
from pltmoe.reports.glance import NOT_RUN, Extras, baseline
from pltmoe.reports.markdown import table
from pltmoe.reports.runs import Run
from pltmoe.reports.scores import PAPER_TASKS, common_tasks

_YES = "yes"


def what_was_done(runs: Sequence[Run], extras: Extras) -> str:
    """Return the section: each part of a comparison, for each run, and what follows."""
    parts: list[tuple[str, Callable[[Run], str]]] = [
        ("training", _training),
        ("validation", _validation),
        ("throughput, memory", lambda run: _logged(run, "perf/tokens_per_second_per_gpu")),
        ("MFU", _mfu),
        ("expert balance", _balance),
        ("expert overlap between loops", _overlap),
        ("gate means", _gates),
        ("loop diagnostics", _diagnostics),
        ("benchmark scores", lambda run: _scores(run, extras)),
        ("decode latency, measured cache", lambda run: _decode(run, extras)),
    ]
    rows = [["part", *(run.name for run in runs)]]
    rows += [[name, *(answer(run) for run in runs)] for name, answer in parts]
    said = [_unfinished(runs), _devices(runs), _equal_tokens(runs), _seeds(runs)]
    said += [paper.statement(runs), _baseline(runs), _decode_statement(runs, extras)]
    said += [_score_statement(extras)]
    missing = [run.name for run in runs if not run.series("valid/loss")]
    said.append(f"Not validated: {', '.join(missing)}." if missing else "")
    sentences = "\n".join(f"- {sentence}" for sentence in said if sentence)
    head = "## What was run and what was not"
    return f"{head}\n\n{table(rows, left=1 + len(runs))}\n\n{sentences}"


def _training(run: Run) -> str:
    done, steps = run.last_step, run.config.train.steps
    return f"all {steps:,} steps" if done >= steps else f"**{done:,} of {steps:,} steps**"


def _validation(run: Run) -> str:
    times = len(run.series("valid/loss"))
    return f"{_YES}, {times} times" if times else NOT_RUN


def _logged(run: Run, metric: str) -> str:
    return _YES if any(key.startswith(metric) for line in run.lines for key in line) else NOT_RUN


def _mfu(run: Run) -> str:
    if run.series("perf/mfu"):
        return _YES
    return f"not known: no listed peak of {run.tag('device') or 'an unknown device'}"


def _balance(run: Run) -> str:
    return _logged(run, "moe/load_imbalance") if run.config.model.is_moe else "dense: none"


def _overlap(run: Run) -> str:
    if not run.config.model.is_moe:
        return "dense: none"
    if run.config.model.num_loops == 1:
        return "one loop: none"
    return _logged(run, "moe/expert_overlap")


def _gates(run: Run) -> str:
    return _logged(run, "plt/gate_mean") if run.config.model.gated_swa else "no G-SWA: none"


def _diagnostics(run: Run) -> str:
    return _logged(run, "plt/update_size") if run.config.model.num_loops > 1 else "one loop: none"


def _scores(run: Run, extras: Extras) -> str:
    found = extras.evaluations.get(run.name)
    if found is None:
        return NOT_RUN
    tasks = f"{len(found.tasks)} task{'s' * (len(found.tasks) != 1)}"
    return tasks if found.limit is None else f"{tasks}, **only {found.limit:g} samples each**"


def _decode(run: Run, extras: Extras) -> str:
    entry = extras.decode.get(run.name)
    return NOT_RUN if entry is None else f"{_YES}, batch {entry.get('batch', '?')}"


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
    seeds = [str(seed) for seed in sorted({run.config.train.seed for run in runs})]
    ran = f"Seeds {', '.join(seeds)}" if len(seeds) > 1 else f"One run each (seed {seeds[0]})"
    return f"{ran}: a difference as small as that between two seeds is not a result."


def _baseline(runs: Sequence[Run]) -> str:
    first = baseline(runs)
    if len(runs) == 1:
        return ""
    if first.config.model.num_loops == 1:
        return f"Ratios are to {first.name}."
    return f"Ratios are to {first.name}: none of these runs has one loop, as the paper's baseline."


def _decode_statement(runs: Sequence[Run], extras: Extras) -> str:
    measured = [run for run in runs if run.name in extras.decode]
    if not measured:
        return "Decoding was not measured: the paper's latency of about 0.70x is not tested here."
    entry = extras.decode[measured[0].name]
    text = f"Decode times: {entry.get('device', 'unknown device')}, batch {entry.get('batch', '?')}"
    text += f", context {entry.get('context', '?')}"
    if command := entry.get("command"):
        text += f", by `{command}`"
    text += f". The paper's ratio is {paper.LATENCY_RANGE}."
    looped = [r for r in measured if r.config.model.num_loops > 1]
    at_once = [r.name for r in looped if extras.decode[r.name].get("passes") == 1]
    in_turn = [r.name for r in looped if r.name not in at_once]
    if at_once:
        text += f" All loops of a token were one forward pass in {' and '.join(at_once)}."
    if in_turn:
        text += f" The loops ran one after another in {' and '.join(in_turn)}."
    return text


def _score_statement(extras: Extras) -> str:
    if not extras.evaluations:
        return (
            "No benchmark of knowledge or reasoning was run; loss is all that is compared here, "
            f"and the paper's {paper.SCORE} is not tested."
        )
    tasks = common_tasks(list(extras.evaluations.values()))
    if not tasks:
        return "No task with right and wrong answers was run alike on all models: no average."
    if tuple(tasks) == PAPER_TASKS:
        return (
            f"The average is over the paper's {paper.SCORE_TASKS} benchmarks: {', '.join(tasks)}."
        )
    return (
        f"The average is over {', '.join(tasks)}, not the paper's {paper.SCORE_TASKS} benchmarks: "
        f"it is not to be compared with the paper's {paper.SCORE}."
    )
