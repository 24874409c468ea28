"""Write a corpus of real text that every machine has: Python's standard library, as JSONL."""

import argparse
from pathlib import Path

from pltmoe.data.corpus import build_corpus
from pltmoe.runtime.command_line import output_file, positive, run_tool


def main() -> None:
    """Parse the command line and build the corpus."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=output_file, required=True, help="JSONL file to write")
    parser.add_argument("--max-bytes", type=positive, help="stop before so many bytes of source")
    parser.add_argument("--include-tests", action="store_true", help="take the test suites as well")
    parser.add_argument("--library", type=Path, help="folder of sources (default: this Python)")
    args = parser.parse_args()
    manifest = build_corpus(
        args.output,
        max_bytes=args.max_bytes,
        include_tests=args.include_tests,
        library=args.library,
    )
    print(f"{args.output}: {manifest['documents']:,} documents, {manifest['bytes']:,} bytes")


if __name__ == "__main__":
    run_tool(main)
