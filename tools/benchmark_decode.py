"""Measure decoding: time per token, cache, expert and memory traffic, prefill; or exported models.

    python tools/benchmark_decode.py
        vanilla, vanilla loop-2, + CLP, + shared KV, PLT-2, PLT-3 at one size and the headline pair,
        with random weights, beside the paper's ratios; on a CPU with scaled-down sizes
    python tools/benchmark_decode.py --compare none --config configs/plt_moe_1b_7b.yaml
        any configuration
    python tools/benchmark_decode.py --model vanilla=DIR --model plt2=DIR --output decode.json
        exported folders, side by side, for tools/compare_runs.py --decode

Writes decode.json, decode.md and decode.png into --output; runs of the same device, versions and
commit add to what is there, so that a machine can be used for short whiles.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pltmoe.inference.benchmark.exported import DecodeSetup, measure_exported
from pltmoe.inference.benchmark.measure import Result, Setup, measure
from pltmoe.inference.benchmark.report import JSON_FILE, MARKDOWN_FILE, add_run, write_json
from pltmoe.inference.benchmark.suite import ABLATION, HEADLINE, candidates
from pltmoe.reports.decode import plot_decode
from pltmoe.runtime.command_line import positive, run_tool
from pltmoe.runtime.devices import device, parameter_dtype
from pltmoe.runtime.versions import commit, versions

REPOSITORY = Path(__file__).resolve().parents[1]
GROUPS = {"ablation": ABLATION, "headline": HEADLINE}
SCALED_DOWN = Setup((1, 4, 16, 32, 64), 4096, 16, 5, (1024, 4096, 8192), 1)
"""For a CPU, with suite.SCALED_DOWN."""
_OF_RANDOM_WEIGHTS = ("compare", "config", "only", "scaled_down", "fp8", "fuse", "context",
                      "batches", "prefill")  # fmt: skip
_OF_FOLDERS = ("batch", "prompt_tokens")


def main() -> None:
    """Parse the command line, measure, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="folder; with --model: JSON file")
    random = parser.add_argument_group("random weights")
    random.add_argument("--compare", default=",".join(GROUPS), help="%(default)s; none")
    random.add_argument("--config", action="append", type=Path, default=[], help="YAML of a run")
    random.add_argument("--only", action="append", default=[], help="name of a model; repeat")
    random.add_argument(
        "--scaled-down", action="store_true", help="their models small; always on a CPU"
    )
    random.add_argument("--fp8", action="store_true", help="experts in FP8 (not on a CPU)")
    random.add_argument("--fuse", action="store_true", help="compile between the large kernels")
    random.add_argument("--context", type=positive, help="slots in the cache at first (4096)")
    random.add_argument("--batches", type=_numbers, help="e.g. 1,4,16 (1..256); none: 0")
    random.add_argument("--prefill", type=_numbers, help="prompt lengths (1k..32k); none: 0")
    exported = parser.add_argument_group("exported folders")
    exported.add_argument("--model", action="append", default=[], metavar="NAME=DIR")
    exported.add_argument("--batch", type=positive, default=DecodeSetup.batch)
    exported.add_argument("--prompt-tokens", type=positive, default=DecodeSetup.prompt_tokens)
    parser.add_argument("--new-tokens", type=positive, help="tokens decoded in a round")
    parser.add_argument("--rounds", type=positive, help="rounds; the median counts")
    args = parser.parse_args()
    if args.model:
        _exported(args, parser)
    else:
        _random(args, parser)


def _refuse_others(
    args: argparse.Namespace, parser: argparse.ArgumentParser, names: Sequence[str], why: str
) -> None:
    """Refuse options that would be passed over, and a number be taken for what it is not."""
    for name in names:
        if getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')} is {why}")


def _exported(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    models = {}
    for item in args.model:
        name, equals, folder = item.partition("=")
        if not (name and equals and folder):
            parser.error(f"--model {item}: expected NAME=DIR")
        models[name] = Path(folder)
    _refuse_others(args, parser, _OF_RANDOM_WEIGHTS, "for random weights: leave out --model")
    if args.output is None:
        parser.error("--model needs --output, the JSON file to write")
    new_tokens, rounds = args.new_tokens or DecodeSetup.new_tokens, args.rounds
    setup = DecodeSetup(args.batch, args.prompt_tokens, new_tokens, rounds or DecodeSetup.rounds)
    results = measure_exported(models, setup, _where())
    write_json(args.output, results)
    for name, result in results.items():
        print(
            f"{name:24s} {result['ms_per_token']:9.2f} ms/token   cache "
            f"{result['cache_bytes_per_sequence'] / 1024:9.1f} KiB/sequence   "
            f"batch {result['batch']}, context {result['context']}, {result['device']}"
        )


def _random(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    _refuse_others(args, parser, _OF_FOLDERS, "for exported folders: give --model")
    names = [name for name in args.compare.split(",") if name != "none"]
    if unknown := sorted(set(names) - set(GROUPS)):
        parser.error(f"unknown comparison {unknown[0]}; there are {', '.join(GROUPS)}, none")
    scaled_down = args.scaled_down or not torch.cuda.is_available()
    groups = [GROUPS[name] for name in names]
    models = candidates(REPOSITORY / "configs", groups, args.config, scaled_down)
    if unknown := sorted(set(args.only) - {c.name for c in models}):
        parser.error(f"--only {unknown[0]}: there are {', '.join(c.name for c in models)}")
    models = [c for c in models if not args.only or c.name in args.only]
    if not models:
        parser.error("--compare none needs a --config")
    setup, output = _setup(args, scaled_down), args.output or REPOSITORY / "runs/benchmark_decode"
    dtype = parameter_dtype("auto")
    scale = "scaled-down models; the targets are for one H200 and the paper's sizes"
    about = {"dtype": str(dtype).removeprefix("torch."), "commit": commit()}
    about["dtype"] += ", experts in FP8" if args.fp8 else ""
    about["dtype"] += ", fused" if args.fuse else ""
    about["scale"] = scale if scaled_down and groups else "the models of the configurations"
    where = _where() | about

    def keep(result: Result) -> None:
        plot_decode(add_run(output, result, models, setup, where), output / "decode.png")

    measure(models, setup, device(), dtype, keep)
    print((output / MARKDOWN_FILE).read_text(encoding="utf-8"))
    print(f"wrote {output / JSON_FILE}, {MARKDOWN_FILE}, decode.png")


def _setup(args: argparse.Namespace, scaled_down: bool) -> Setup:
    given = {
        "batches": args.batches,
        "context": args.context,
        "new_tokens": args.new_tokens,
        "rounds": args.rounds,
        "prefill_tokens": args.prefill,
    }
    default = SCALED_DOWN if scaled_down else Setup()
    return Setup(
        **vars(default)
        | {"fp8": args.fp8, "fuse": args.fuse}
        | {name: x for name, x in given.items() if x is not None}
    )


def _where() -> dict[str, Any]:
    """Say where and how: every figure stands beside this."""
    name = f"CPU ({torch.get_num_threads()} of {os.cpu_count()} cores used)"
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else name,
        "versions": versions(),
        "command": shlex.join(["python", *sys.argv]),
    }


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(number for item in text.split(",") if (number := int(item)) > 0)


if __name__ == "__main__":
    run_tool(main)
