"""Convert a checkpoint to a Hugging Face folder, and check that both compute the same logits."""

import argparse
from pathlib import Path

import torch

from pltmoe.hf.convert import ExportOptions, export_checkpoint, verify_folder
from pltmoe.runtime.command_line import run_tool

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def main() -> None:
    """Parse the command line and convert."""
    args = _parser().parse_args()
    if args.verify_only:
        print(verify_folder(args.checkpoint, args.output))
        return
    options = ExportOptions(
        dtype=getattr(torch, args.dtype) if args.dtype else None,
        max_shard_bytes=args.max_shard_size,
        tokenizer=not args.no_tokenizer,
        verify=not args.no_verify,
    )
    export = export_checkpoint(args.checkpoint, args.output, options)
    print(f"{export.checkpoint} -> {export.folder} ({export.architecture})")
    print(export.checked)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        help="a step_XXXXXXXX folder, or a run's folder (its latest checkpoint)",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to make")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="of the exported weights; default: as in the checkpoint",
    )
    parser.add_argument(
        "--max-shard-size",
        type=_bytes,
        default=ExportOptions.max_shard_bytes,
        help="of one safetensors file, e.g. 5GB (default) or 500MB",
    )
    parser.add_argument("--no-tokenizer", action="store_true", help="export without tokenizer")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--no-verify", action="store_true", help="do not compare logits")
    how.add_argument(
        "--verify-only", action="store_true", help="compare an existing export, write nothing"
    )
    return parser


def _bytes(text: str) -> int:
    number, unit = text[:-2], text[-2:].upper()
    if unit not in _UNITS or not number.isdigit() or int(number) == 0:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number and KB, MB or GB, e.g. 5GB")
    return int(number) * _UNITS[unit]


if __name__ == "__main__":
    run_tool(main)
