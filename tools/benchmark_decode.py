"""Time decoding of exported models, side by side in one run, and measure their caches.

python tools/benchmark_decode.py --model vanilla=DIR --model plt2=DIR --output decode.json
"""

import argparse
import shlex
import sys
from pathlib import Path

from pltmoe.hf.decode_latency import DecodeSetup, measure_decode, write_decode
from pltmoe.runtime.command_line import run_tool


def main() -> None:
    """Parse the command line, measure, print a table."""
    default = DecodeSetup()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", action="append", required=True, metavar="NAME=DIR")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--batch", type=int, default=default.batch)
    parser.add_argument("--prompt-tokens", type=int, default=default.prompt_tokens)
    parser.add_argument("--new-tokens", type=int, default=default.new_tokens)
    parser.add_argument("--rounds", type=int, default=default.rounds)
    args = parser.parse_args()
    models = {}
    for item in args.model:
        name, equals, folder = item.partition("=")
        if not (name and equals and folder):
            parser.error(f"--model {item}: expected NAME=DIR")
        models[name] = Path(folder)
    setup = DecodeSetup(args.batch, args.prompt_tokens, args.new_tokens, args.rounds)
    results = measure_decode(models, setup)
    write_decode(results, shlex.join(["python", *sys.argv]), args.output)
    for name, result in results.items():
        print(
            f"{name:24s} {result['ms_per_token']:9.2f} ms/token   cache "
            f"{result['cache_bytes_per_sequence'] / 1024:9.1f} KiB/sequence   "
            f"batch {result['batch']}, context {result['context']}, {result['device']}"
        )


if __name__ == "__main__":
    run_tool(main)
