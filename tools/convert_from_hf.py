"""Convert a Hugging Face folder to a checkpoint that a run can start from.

Public LoopCoder-v2 weights (IQuestPLTCoderForCausalLM) become a Hugging Face folder of ours
instead, which runs them in one pass per token; they need no --config.
"""

import argparse
from pathlib import Path

import torch

from pltmoe.config import load_config
from pltmoe.errors import ConfigError, ConversionError
from pltmoe.hf.loopcoder import convert_loopcoder, is_loopcoder
from pltmoe.runtime.command_line import run_tool
from pltmoe.runtime.cpu import stand_in_for_cuda
from pltmoe.runtime.logs import leave_out_import_warnings
from pltmoe.runtime.tokenizer_files import find_tokenizer


def main() -> None:
    """Parse the command line and convert."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder")
    parser.add_argument("--output", type=Path, required=True, help="checkpoint folder to make")
    parser.add_argument(
        "--config",
        type=Path,
        help="configuration of the run that will start from it; its model section must fit",
    )
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], help="default: as in the folder"
    )
    parser.add_argument("overrides", nargs="*", help="e.g. model.num_loops=3")
    args = parser.parse_intermixed_args()
    config = None if args.config is None else load_config(args.config, args.overrides)
    if is_loopcoder(args.model):
        _convert_loopcoder(args)
        return
    if config is None:
        raise ConfigError(
            f"{args.model}: give --config, the run that will start from these weights"
        )
    leave_out_import_warnings()
    stand_in_for_cuda()
    from pltmoe.hf.convert_back import import_folder  # imports Megatron: after the stand-in

    dtype = getattr(torch, args.dtype) if args.dtype else None
    import_folder(args.model, args.output, config, dtype)
    print(f"{args.model} -> {args.output}; start a run from it with")
    tokenizer = find_tokenizer(args.output)
    more = "" if tokenizer is None else f" data.tokenizer={tokenizer}"
    print(f"  checkpoint.load_weights={args.output}{more}")


def _convert_loopcoder(args: argparse.Namespace) -> None:
    if args.config is not None or args.overrides or args.dtype:
        raise ConversionError(
            f"{args.model}: LoopCoder-v2 becomes a Hugging Face folder as it is: leave out "
            "--config, --dtype and overrides"
        )
    config = convert_loopcoder(args.model, args.output)
    print(f"{args.model} -> {args.output}: PLT-{config.plt_num_loops}, one pass per token")
    print(f"  transformers serve {args.output} --trust-remote-code")


if __name__ == "__main__":
    run_tool(main)
