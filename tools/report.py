"""Write one report about several runs: Markdown, pictures, and the CSVs behind them.

python tools/report.py RUN_DIR... --output DIR [--decode decode.json] [--generated samples.json]
"""

import argparse
from pathlib import Path

from pltmoe.reports.runs import Run, read_mlflow_run, read_run
from pltmoe.reports.summary import Extras, read_decode, read_generated, write_report
from pltmoe.runtime.command_line import run_tool
from pltmoe.tracking.mlflow import attach, how_to_look
from pltmoe.tracking.sync import sync


def main() -> None:
    """Parse the command line and write the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN_DIR")
    parser.add_argument(
        "--mlflow-run",
        nargs=2,
        action="append",
        default=[],
        metavar=("URI", "RUN_ID"),
        help="a run to read from MLflow; may be repeated",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--decode", type=Path, help="JSON of tools/benchmark_decode.py")
    parser.add_argument("--generated", type=Path, help="JSON of tools/generate.py")
    parser.add_argument("--title", default="Comparison of runs")
    parser.add_argument(
        "--attach", action="store_true", help="also put the report into the MLflow runs"
    )
    args = parser.parse_args()
    if not args.runs and not args.mlflow_run:
        parser.error("give at least one RUN_DIR or --mlflow-run")
    runs: list[Run] = [read_run(path) for path in args.runs]
    runs += [read_mlflow_run(uri, run_id) for uri, run_id in args.mlflow_run]
    extras = Extras(
        read_decode(args.decode) if args.decode else {},
        read_generated(args.generated) if args.generated else [],
    )
    report = write_report(runs, args.output, args.title, extras)
    print(f"report: {report}")
    if where := next(filter(None, map(how_to_look, args.runs)), None):
        print(f"MLflow: {where}")
    if args.attach:
        _attach(args.runs, args.output)


def _attach(run_dirs: list[Path], folder: Path) -> None:
    files = sorted(path for path in folder.iterdir() if path.suffix in (".md", ".png", ".csv"))
    for run_dir in run_dirs:
        if attach(run_dir, files, folder="report"):
            print(f"attached to {sync(run_dir).where}")


if __name__ == "__main__":
    run_tool(main)
