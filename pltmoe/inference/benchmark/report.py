"""Records of decode benchmarks as one JSON file that grows run by run, and as Markdown."""

import copy
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pltmoe.errors import DataError
from pltmoe.inference.benchmark.measure import Result, Setup
from pltmoe.inference.benchmark.ratios import Outcome, outcomes
from pltmoe.inference.benchmark.suite import Candidate, describe

JSON_FILE, MARKDOWN_FILE = "decode.json", "decode.md"
EMPTY: dict[str, Any] = {"runs": [], "models": {}, "decode": [], "prefill": []}
NOT_COMPARABLE = ("device", "versions", "commit", "dtype", "scale")


def add_run(
    folder: Path,
    result: Result,
    models: Sequence[Candidate],
    setup: Setup,
    where: dict[str, str],
) -> dict[str, Any]:
    """Add a run to ``folder/decode.json`` and return the whole tree.

    Records of the same model and batch replace older ones. A file of another device, version,
    commit, dtype or scale is begun anew.

    Raises:
        DataError: what lies there is not such a file.
    """
    path = folder / JSON_FILE
    tree = _read(path)
    if any(tree["where"].get(key) != where.get(key) for key in NOT_COMPARABLE):
        tree = copy.deepcopy(EMPTY)
    tree["where"] = {key: where[key] for key in where if key != "command"}
    run = {"command": where["command"], "kernels": result.kernels, "setup": asdict(setup)}
    run["clock"] = result.clock
    run["copy_bytes_per_second"] = result.copy_bytes_per_second
    tree["runs"] = [r for r in tree["runs"] if r["command"] != where["command"]] + [run]
    tree["models"] |= {f"{c.group}: {c.name}": describe(c.model) for c in models}
    tree["decode"] = _merged(tree["decode"], result.decode, "batch")
    tree["prefill"] = _merged(tree["prefill"], result.prefill, "prompt_tokens")
    tree["ratios"] = [_outcome(o) for o in outcomes(tree["decode"], tree["prefill"])]
    write_json(path, tree)
    _write(folder / MARKDOWN_FILE, markdown(tree))
    return tree


def markdown(tree: dict[str, Any]) -> str:
    """Return the whole tree for people: ratios first, then every model."""
    scale = tree["where"]["scale"]
    lines = ["# Decoding", "", f"On {tree['where']['device']}, {tree['where']['dtype']}: {scale}."]
    lines += ["", "## The paper's ratios", "", *_ratio_table(tree), ""]
    for group in dict.fromkeys(r["group"] for r in tree["decode"]):
        lines += [f"## {group}", "", *_decode_table(tree, group), ""]
    if tree["prefill"]:
        lines += ["## Prefill of one sequence, ms", "", *_prefill_table(tree), ""]
    lines += ["## How it was measured", "", *_how(tree)]
    return "\n".join(lines) + "\n"


def _ratio_table(tree: dict[str, Any]) -> list[str]:
    rows = [["ratio", "paper", "target", "at", "measured", ""]]
    for entry in tree["ratios"]:
        is_prefill = entry["quantity"] == "prefill"
        unit = "prompt" if is_prefill else "batch"
        judged = [f"{v:.2f} ({unit} {at})" for at, v in entry["values"].items()]
        wanted = ", ".join(map(str, entry["at"]))
        rows.append([entry["what"], entry["paper"], entry["target"], f"{unit} {wanted}",
                     ", ".join(judged) or "not run", f"**{entry['verdict']}**"])  # fmt: skip
    return _table(rows)


def _decode_table(tree: dict[str, Any], group: str) -> list[str]:
    rows = [["model", "batch", "ms per token", "tokens/s", "KV cache MiB", "distinct experts",
             "GB moved", "share of copy bandwidth"]]  # fmt: skip
    for r in tree["decode"]:
        if r["group"] != group:
            continue
        if "not_run" in r:
            rows.append([r["model"], r["batch"], f"not run: {r['not_run']}", *[""] * 5])
            continue
        rows.append([
            r["model"], r["batch"], f"{r['ms_per_token']:.3f}", f"{r['tokens_per_second']:,.0f}",
            f"{r['cache_bytes'] / 2**20:,.1f}", f"{r['distinct_experts_per_layer']:.1f}",
            f"{r['bytes_moved'] / 1e9:.3f}", f"{r['share_of_copy_bandwidth']:.2f}",
        ])  # fmt: skip
    return _table(rows)


def _prefill_table(tree: dict[str, Any]) -> list[str]:
    lengths = sorted({r["prompt_tokens"] for r in tree["prefill"]})
    rows = [["model", *(f"{n:,}" for n in lengths)]]
    names = dict.fromkeys((r["group"], r["model"]) for r in tree["prefill"])
    for name in names:
        of = {r["prompt_tokens"]: r for r in tree["prefill"] if (r["group"], r["model"]) == name}
        cells = [f"{of[n]['ms']:,.1f}" if n in of else "not run" for n in lengths]
        rows.append([f"{name[1]} ({name[0]})", *cells])
    return _table(rows)


def _how(tree: dict[str, Any]) -> list[str]:
    lines = [
        "- Random weights; nothing was loaded. Routers with random weights spread random hidden "
        "states evenly over the experts, and every sequence is given another random token at each "
        "step. Loops with independent routing agree on experts only by chance here; trained ones "
        "agree more often, so their figures lie between independent and shared.",
        "- ms per token: the median round of a decode step (one token of every sequence).",
        "- distinct experts: per layer and step, summed over passes. GB moved: weights of those "
        "experts, all other weights once per pass, keys and values; activations are not counted.",
        "- share of copy bandwidth: GB moved per second over what a copy within the device's "
        "memory reads and writes, measured in the same run.",
    ]
    alone = dict.fromkeys(r["model"] for r in tree["decode"] if r.get("in_turn_with") == 0)
    if alone:
        lines.append(f"- Measured alone, not in turn with others: {', '.join(alone)}.")
    for name, value in tree["where"].items():
        if isinstance(value, dict):
            value = ", ".join(" ".join(item) for item in value.items())
        lines.append(f"- {name}: {value}")
    for r in tree["runs"]:
        s = r["setup"]
        lines.append(
            f"- `{r['command']}`: context {s['context']}, {s['new_tokens']} tokens, {s['rounds']} "
            f"rounds, {r['clock']}; copy {r['copy_bytes_per_second'] / 1e9:.1f} GB/s; "
            f"{r['kernels']}"
        )
    sizes: dict[str, list[str]] = {}
    for name, size in tree["models"].items():
        sizes.setdefault(size, []).append(name.partition(": ")[2])
    return lines + [f"- {'; '.join(dict.fromkeys(names))}: {s}" for s, names in sizes.items()]


def _outcome(o: Outcome) -> dict[str, Any]:
    t = o.target
    return {"what": t.what, "paper": t.paper, "target": t.wanted(), "quantity": t.quantity,
            "at": t.at, "values": o.values, "verdict": o.verdict}  # fmt: skip


def _merged(old: list[dict[str, Any]], new: list[dict[str, Any]], at: str) -> list[dict[str, Any]]:
    records = {(r["group"], r["model"], r[at]): r for r in [*old, *new]}
    order = {(r["group"], r["model"]): i for i, r in reversed(list(enumerate([*old, *new])))}
    return sorted(records.values(), key=lambda r: (order[r["group"], r["model"]], r[at]))


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {"where": {}}
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        tree = None
    if not isinstance(tree, dict) or not tree.keys() >= {"where", *EMPTY}:
        raise DataError(
            f"{path} is not a file of this benchmark: move it away or choose another --output"
        )
    return tree


def _table(rows: list[list[Any]]) -> list[str]:
    header, *rest = rows
    lines = [header, ["---"] * len(header), *rest]
    return [f"| {' | '.join(map(str, line))} |" for line in lines]


def write_json(path: Path, tree: Any) -> None:
    """Write through a temporary name."""
    _write(path, json.dumps(tree, indent=2) + "\n")


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    os.replace(temporary, path)
