"""Compare the time of training steps, side by side in one run, as ratios with goals.

    OMP_NUM_THREADS=1 python tools/benchmark_train.py
    python tools/benchmark_train.py --compare loops --config configs/plt_moe_1b_7b.yaml

loops      a looped model's step / the vanilla step of the same layers
megatron   our vanilla step / Megatron-core's own GPT with experts

Without --config, a small mixture of experts that a CPU trains in a second or less per step.
Overrides (section.key=value) change its sizes. docs/benchmarks.md shows what was measured.
"""

import argparse
import shlex
import sys
from pathlib import Path

from pltmoe.config import load_config
from pltmoe.runtime.command_line import run_tool
from pltmoe.runtime.cpu import stand_in_for_cuda
from pltmoe.runtime.logs import configure_logging

REPOSITORY = Path(__file__).resolve().parents[1]
SMALL = (
    "model.vocab_size=1024",
    "model.num_layers=4",
    "model.hidden_size=256",
    "model.num_attention_heads=8",
    "model.num_kv_heads=2",
    "model.head_dim=32",
    "model.num_experts=8",
    "model.moe_ffn_hidden_size=256",
    "parallel.expert_parallel_size=1",
    "data.sequence_length=256",
    "train.micro_batch_size=4",
    "train.global_batch_size=4",
    "optimizer.lr=0.0001",
    "optimizer.min_lr=0.0001",
)
"""What makes the quickstart's PLT-2 wide enough for its matrix products to dominate."""


def main() -> None:
    """Parse the command line, measure, print tables and write them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--compare", default="loops,megatron", help="of loops,megatron")
    parser.add_argument("--config", type=Path, help="YAML file of a looped run (default: small)")
    parser.add_argument("--rounds", type=int, default=20, help="steps of each that count")
    parser.add_argument("--warm-up", type=int, default=3, help="steps of each before them")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "runs" / "benchmark_train")
    parser.add_argument("--profile", action="store_true", help="show where a step's time goes")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_args()
    small = args.config is None
    config = load_config(
        REPOSITORY / "configs/quickstart_plt2.yaml" if small else args.config,
        [*(SMALL if small else ()), *args.overrides],
    )
    configure_logging(rank=0)
    stand_in_for_cuda()
    # Megatron may be imported only after the CPU stands in for CUDA.
    from pltmoe.runtime import distributed
    from pltmoe.train.benchmark.compare import COMPARISONS, Options, compare
    from pltmoe.train.benchmark.report import markdown, write

    wanted = args.compare.split(",")
    if unknown := sorted(set(wanted) - set(COMPARISONS)):
        parser.error(f"unknown comparison {unknown[0]}; there are {', '.join(COMPARISONS)}")
    options = Options(args.rounds, args.warm_up, args.profile)
    distributed.start(distributed.processes_from_environment())
    try:
        for name in wanted:
            report, profiles = compare(name, config, options, shlex.join(["python", *sys.argv]))
            print(markdown(report), profiles, sep="\n")
            print("wrote", *write(report, args.output))
    finally:
        distributed.stop()


if __name__ == "__main__":
    run_tool(main)
