"""Compare the time of training steps, side by side in one run, as ratios with goals.

    OMP_NUM_THREADS=1 python tools/benchmark_train.py
    python tools/benchmark_train.py --compare loops --config configs/plt_moe_1b_7b.yaml

loops      a looped model's step / the vanilla step of the same layers
megatron   our vanilla step / Megatron-core's own GPT with experts
mfu        one model alone, as large as the device takes: its time and MFU; not among the defaults
precision  a step in FP8 / in bf16; needs Transformer Engine on a GPU, and is not among the defaults
engines    a step of DeepSpeed's ZeRO 2 / of the Megatron engine, the other stages beside them, and
           the memory of each; starts its own processes, and is not among the defaults
pipeline   forward and backward on two stages / what the schedule table predicts; starts its own
           processes; among the defaults where the configuration has stages

Without --config, a small mixture of experts that a CPU trains in a second or less per step.
Overrides (section.key=value) change its sizes. docs/benchmarks.md shows what was measured.
"""

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from pltmoe.config import RunConfig, load_config
from pltmoe.runtime import distributed
from pltmoe.runtime.command_line import positive, run_tool
from pltmoe.runtime.cpu import stand_in_for_cuda
from pltmoe.runtime.logs import configure_logging
from pltmoe.train.benchmark.configs import check

REPOSITORY = Path(__file__).resolve().parents[1]
DEFAULTS = ("loops", "megatron", "pipeline")
NAMES = (*DEFAULTS, "precision", "mfu", "engines")
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
STARTS_PROCESSES = {
    "pipeline": (
        "parallel.pipeline_parallel_size=2",
        "train.micro_batch_size=2",
        "train.global_batch_size=16",
    ),
    "engines": ("parallel.expert_parallel_size=2", "train.global_batch_size=16"),
}
"""Comparisons on two processes, and what changes in the small model for them."""


def main() -> int:
    """Parse the command line, measure, print tables and write them."""
    args = _arguments()
    code = 0
    try:
        for name, config in _configs(args).items():
            if _starts(name):
                only = [] if args.compare == name else ["--compare", name]
                code = _start_processes(_processes(name, config), only) or code
            else:
                _compare(name, config, args)
    finally:
        distributed.stop()  # once: ranks that join a second time may meet one that is leaving
    return code


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--compare", help=f"of {','.join(NAMES)} (default: {','.join(DEFAULTS)})")
    parser.add_argument("--config", type=Path, help="YAML file of a looped run (default: small)")
    parser.add_argument("--rounds", type=positive, default=20, help="steps of each that count")
    parser.add_argument("--warm-up", type=int, default=3, help="steps of each before them")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "runs" / "benchmark_train")
    parser.add_argument(
        "--profile", action="store_true", help="show where a step's time goes; not of pipeline"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args()
    if args.compare and (unknown := sorted(set(args.compare.split(",")) - set(NAMES))):
        parser.error(f"unknown comparison {unknown[0]}; there are {', '.join(NAMES)}")
    return args


def _configs(args: argparse.Namespace) -> dict[str, RunConfig]:
    """Return comparison -> configuration, all checked before the first one takes its time."""
    found = {}
    for name in args.compare.split(",") if args.compare else DEFAULTS:
        path, small = args.config, ()
        if path is None:
            path = REPOSITORY / "configs/quickstart_plt2.yaml"
            small = (*SMALL, *STARTS_PROCESSES.get(name, ()))
        config = load_config(path, [*small, *args.overrides])
        if name == "pipeline" and not args.compare and config.parallel.pipeline_parallel_size == 1:
            if distributed.processes_from_environment().rank == 0:
                print("pipeline is left out: parallel.pipeline_parallel_size is 1")
            continue
        check(name, config, _processes(name, config))
        found[name] = config
    return found


def _starts(name: str) -> bool:
    """Return whether a comparison starts its own processes: no launcher has."""
    return name in STARTS_PROCESSES and distributed.processes_from_environment().world_size == 1


def _processes(name: str, config: RunConfig) -> int:
    """Return how many there are, or will be."""
    if _starts(name):
        return max(config.parallel.pipeline_parallel_size, 2)
    return distributed.processes_from_environment().world_size


def _start_processes(count: int, more: Sequence[str]) -> int:
    """Run this command again on ``count`` processes, with ``more`` arguments."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    command = [sys.executable, *launcher, __file__, *sys.argv[1:], *more]
    sys.stdout.flush()
    paths = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}).returncode


def _compare(name: str, config: RunConfig, args: argparse.Namespace) -> None:
    processes = distributed.processes_from_environment()
    configure_logging(processes.rank)
    stand_in_for_cuda()
    # Megatron may be imported only after the CPU stands in for CUDA.
    from pltmoe.train.benchmark.compare import Options, compare
    from pltmoe.train.benchmark.report import markdown, write

    distributed.start(processes)
    options = Options(args.rounds, args.warm_up, args.profile)
    report, profiles = compare(
        name, config, options, shlex.join(["python", "tools/benchmark_train.py", *sys.argv[1:]])
    )
    if distributed.is_main():
        print(markdown(report), profiles, sep="\n")
        print("wrote", *write(report, profiles, args.output), flush=True)


if __name__ == "__main__":
    run_tool(main, takes_torchrun=True)
