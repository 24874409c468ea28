"""Train a lossless sentencepiece tokenizer on text files, JSONL files or folders of them."""

import argparse

from pltmoe.data.tokenizer_training import TrainingOptions, train_tokenizer
from pltmoe.runtime.command_line import add_text_arguments, output_file, positive, run_tool


def main() -> None:
    """Parse the command line and train."""
    default = TrainingOptions(vocab_size=0)
    parser = argparse.ArgumentParser(description=__doc__)
    add_text_arguments(parser, default.json_key)
    parser.add_argument("--output", type=output_file, required=True, help="model file to write")
    parser.add_argument("--vocab-size", type=positive, required=True, help="number of pieces")
    parser.add_argument(
        "--max-bytes",
        type=positive,
        default=default.max_bytes,
        help="of the sample to train on (default %(default)s)",
    )
    parser.add_argument(
        "--character-coverage",
        type=float,
        default=default.character_coverage,
        help="share of the characters that become pieces (default %(default)s); the others are "
        "written as bytes",
    )
    args = parser.parse_args()
    options = TrainingOptions(
        vocab_size=args.vocab_size,
        json_key=args.json_key,
        max_bytes=args.max_bytes,
        character_coverage=args.character_coverage,
    )
    tokenizer = train_tokenizer(args.inputs, args.output, options)
    print(f"{args.output}: {tokenizer.vocab_size:,} pieces, documents end with id {tokenizer.eod}")


if __name__ == "__main__":
    run_tool(main)
