"""Send what MLflow missed of a run: python tools/sync_mlflow.py RUN_DIR [--uri URI]."""

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from pltmoe.errors import PLTMoEError
from pltmoe.runtime.command_line import run_tool
from pltmoe.tracking.sync import sync


def main() -> int:
    """Sync every given directory; 1 if one of them could not be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", type=Path, nargs="+", help="output directory of a run")
    parser.add_argument("--uri", help="tracking server (default: where the run was tracked)")
    parser.add_argument(
        "--status",
        choices=["FINISHED", "FAILED", "KILLED"],
        help="how the run ended, when nothing recorded it (a lost machine)",
    )
    args = parser.parse_args()
    failed = 0
    for run_dir in args.run_dir:
        size = sum(path.stat().st_size for path in run_dir.glob("*metrics.jsonl"))
        with tqdm(total=size, unit="B", unit_scale=True, desc=run_dir.name) as bar:
            try:
                done = sync(run_dir, args.uri, args.status, lambda n, b=bar: b.update(n))
            except PLTMoEError as error:
                tqdm.write(f"error: {error}", file=sys.stderr)
                failed += 1
                continue
        print(f"{run_dir}: {done.status}, {done.sent_metrics} points sent, {done.where}")
    return 1 if failed else 0


if __name__ == "__main__":
    run_tool(main)
