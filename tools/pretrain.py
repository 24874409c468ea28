"""Pretrain a model described by a configuration file.

    python tools/pretrain.py --config configs/X.yaml [section.key=value ...]
    torchrun --nproc-per-node 2 tools/pretrain.py --config configs/X.yaml [section.key=value ...]
    srun ... python tools/pretrain.py --config configs/X.yaml ...      see slurm/

The run continues by itself when its output folder holds a checkpoint.
"""

import argparse
import faulthandler
import logging
import sys

from pltmoe.config import RunConfig, load_config
from pltmoe.errors import ConfigError, PLTMoEError
from pltmoe.runtime.command_line import open_closed_streams
from pltmoe.runtime.logs import configure_logging


def main() -> int:
    """Parse the command line, train, and turn every ending into an exit code."""
    open_closed_streams()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="YAML file of the run")
    parser.add_argument(
        "--print",
        choices=["train.output_dir", "tracking.mlflow_uri"],
        help="print this field (nothing if it is not set) for a script, and end",
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments, unknown = parser.parse_known_intermixed_args()
    if arguments.print:
        return _print_field(arguments, unknown)

    from pltmoe.runtime import distributed  # torch: what follows takes seconds
    from pltmoe.runtime.cpu import stand_in_for_cuda

    try:
        processes = distributed.processes_from_environment()
        configure_logging(processes.rank)
        faulthandler.enable(2)  # a crash in C code shows the stack of every thread
        config = _config(arguments, unknown)
        stand_in_for_cuda()
        # Megatron may be imported only after the CPU stands in for CUDA.
        from pltmoe.train.pretrain import pretrain

        return pretrain(config)
    except PLTMoEError as error:
        if distributed.speaks_for_error(error):
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except Exception:
        logging.getLogger("pretrain").exception("training failed")
        return 1
    finally:
        distributed.stop()


def _config(arguments: argparse.Namespace, unknown: list[str]) -> RunConfig:
    if unknown:
        raise ConfigError(
            f"unknown arguments {' '.join(unknown)}: fields are given without dashes, as in "
            "train.steps=20"
        )
    return load_config(arguments.config, arguments.overrides)


def _print_field(arguments: argparse.Namespace, unknown: list[str]) -> int:
    try:
        config = _config(arguments, unknown)
    except PLTMoEError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    section, _, field = arguments.print.partition(".")
    print(getattr(getattr(config, section), field) or "")
    return 0


if __name__ == "__main__":
    sys.exit(main())
