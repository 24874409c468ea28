"""Tokenize text into a Megatron dataset: PREFIX.bin, PREFIX.idx and PREFIX.manifest.json.

A run that was interrupted continues when the same command is given again.
"""

import argparse
import os
from pathlib import Path

from pltmoe.data.preprocess import PreprocessOptions, preprocess
from pltmoe.runtime.command_line import add_text_arguments, positive, run_tool


def main() -> None:
    """Parse the command line and preprocess."""
    default = PreprocessOptions()
    parser = argparse.ArgumentParser(description=__doc__)
    add_text_arguments(parser, default.json_key)
    parser.add_argument(
        "--tokenizer",
        type=Path,
        required=True,
        help="sentencepiece model, or tokenizer.json with its tokenizer_config.json beside it",
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="PREFIX", help=".bin and .idx are added"
    )
    parser.add_argument(
        "--include",
        default=default.include,
        help="file names to take in folders (default %(default)s)",
    )
    parser.add_argument(
        "--workers",
        type=positive,
        default=os.cpu_count() or 1,
        help="processes (default: one per core)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace another dataset")
    args = parser.parse_args()
    options = PreprocessOptions(
        json_key=args.json_key,
        include=args.include,
        workers=args.workers,
        overwrite=args.overwrite,
    )
    manifest = preprocess(args.inputs, args.output, args.tokenizer, options)
    print(
        f"{args.output}.bin/.idx: {manifest.documents:,} documents, {manifest.tokens:,} tokens, "
        f"{manifest.text_bytes / manifest.tokens:.2f} bytes of text per token"
    )


if __name__ == "__main__":
    run_tool(main)
