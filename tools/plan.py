"""What a run needs on given GPUs: memory, messages, step time. Needs no GPU.

python tools/plan.py --config configs/plt_1.7b_40b.yaml --gpus 64
python tools/plan.py --config configs/plt_1.7b_40b.yaml --gpus 64 --search
python tools/plan.py --config configs/plt_1.7b_40b.yaml --data
python tools/plan.py --table docs/plan.md
"""

import argparse
import json
import sys
from pathlib import Path

from pltmoe.config import RunConfig, load_config
from pltmoe.data.inputs import check_inputs
from pltmoe.errors import ConfigError, PLTMoEError
from pltmoe.parallel.layout import Layout
from pltmoe.plan import check_fits, make_plan
from pltmoe.plan.machines import GPUS
from pltmoe.plan.report import as_json, as_text, page, search_table
from pltmoe.plan.search import candidates, search
from pltmoe.runtime.command_line import positive, run_tool

PAPER = (
    "plt_1.7b_40b",
    "vanilla_2.5b_60b",
    "plt_moe_1b_7b",
    "vanilla_moe_1b_7b",
    "plt_dense_1.2b",
    "vanilla_dense_1.2b",
)
PAGE_GPUS = (8, 64, 256, 1024)


def main() -> int:
    """Plan, search, draw, or write the page; returns the exit code."""
    try:
        return _run(_arguments())
    except PLTMoEError as error:  # 2, so that a launcher knows a refusal from a crash
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(arguments: argparse.Namespace) -> int:
    if arguments.timeline and (arguments.search or arguments.json or arguments.table):
        raise ConfigError("--timeline draws one layout: leave out --search, --json and --table")
    if arguments.table:
        _write_page(arguments.table, arguments.gpu)
        return 0
    if arguments.config is None or (arguments.gpus is None and not arguments.data):
        raise ConfigError("give --config FILE and --gpus N (or --table FILE for the page of docs/)")
    config = load_config(arguments.config, arguments.overrides)
    if arguments.data:
        check_inputs(config)
        if arguments.gpus is None:
            return 0
    if arguments.search:
        return _search(config, arguments)
    plan = make_plan(config, arguments.gpus, arguments.gpu)
    print(json.dumps(as_json(plan), indent=2) if arguments.json else as_text(plan))
    if arguments.timeline:
        _timeline(plan.layout, arguments.timeline)
    check_fits(plan)
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, help="run configuration (YAML)")
    parser.add_argument("--gpus", type=positive, help="GPUs in total")
    parser.add_argument("--gpu", default="H200", help=f"{', '.join(GPUS)} (default H200)")
    parser.add_argument("--search", action="store_true", help="list the best layouts that fit")
    parser.add_argument("--rows", type=positive, default=15, help="rows of --search (default 15)")
    parser.add_argument(
        "--timeline",
        nargs="?",
        const=Path("timeline.png"),
        type=_png,
        metavar="PNG",
        help="also draw the pipeline's schedule, in the terminal and as PNG (timeline.png)",
    )
    parser.add_argument(
        "--data",
        action="store_true",
        help="refuse files of the run that are missing here, and a tokenizer that does not fit",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--table", type=Path, metavar="FILE", help="write the page of docs/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    return parser.parse_intermixed_args()


def _png(text: str) -> Path:
    if not text.endswith(".png"):  # most likely section.key=value
        raise argparse.ArgumentTypeError(f"{text!r} is no picture: write --timeline NAME.png")
    return Path(text)


def _search(config: RunConfig, arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    among = tqdm(candidates(config, arguments.gpus), desc="layouts", disable=None, leave=False)
    found = search(config, arguments.gpus, arguments.gpu, among)
    if not found:
        raise ConfigError(
            f"no layout of {config.name} fits on {arguments.gpus} x {arguments.gpu}: give more "
            "GPUs, or a larger one with --gpu"
        )
    if arguments.json:
        rows = [as_json(plan) | {"overrides": c.overrides()} for c, plan in found[: arguments.rows]]
        print(json.dumps(rows, indent=2))
        return 0
    print(f"{len(found)} layouts of {config.name} fit on {arguments.gpus} x {arguments.gpu}")
    print(search_table(found, arguments.rows))
    print("fastest: " + " ".join(found[0][0].overrides()))
    return 0


def _timeline(layout: Layout, path: Path) -> None:
    from pltmoe.reports.timeline import draw_timeline, timeline_text

    sizes = (layout.pipeline_parallel_size, layout.num_loops, layout.model_chunks_per_stage)
    shown = min(layout.micro_batches, 4 * layout.pipeline_parallel_size)  # more only repeats
    print(f"\nschedule of {shown} of {layout.micro_batches} micro batches")
    print(timeline_text(*sizes, shown, 100))
    print(f"wrote {draw_timeline(*sizes, shown, path)}")


def _write_page(path: Path, gpu: str) -> None:
    folder = Path(__file__).parents[1] / "configs"
    configs = [load_config(folder / f"{name}.yaml") for name in PAPER]
    path.write_text(
        page(configs, PAGE_GPUS, gpu, "python tools/plan.py --table docs/plan.md"), encoding="utf-8"
    )


if __name__ == "__main__":
    run_tool(main)
