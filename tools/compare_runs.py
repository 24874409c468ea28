"""Compare runs: one report of what they are, cost and reach, beside the paper's figures.

python tools/compare_runs.py RUN RUN... --output DIR
    [--decode decode.json] [--evaluation NAME=results.json]... [--mlflow-uri URI]

The URI may be in the environment instead (PLTMOE_MLFLOW_URI), where `ps` does not show a password.

RUN is the output folder of a run (metrics.jsonl, config.yaml), or mlflow:RUN_ID at --mlflow-uri.
DIR gets report.md, its pictures, and a CSV behind each. With --mlflow-uri the runs are brought up
to date there, the report becomes a run "comparison" of their experiment, and its table the
experiment's description. What is missing is said to be; nothing is left blank.

A run's NAME is that of its configuration; where several have the same (seeds of one preset), it is
the end of their folders' paths that tells them apart.
"""

import argparse
import logging
import os
from pathlib import Path

from pltmoe.errors import DataError
from pltmoe.reports.glance import Extras
from pltmoe.reports.runs import MLFLOW_PREFIX, Run, printable, read_mlflow_run, read_run
from pltmoe.reports.scores import read_evaluation
from pltmoe.reports.summary import (
    note,
    read_decode,
    read_generated,
    report_files,
    tell_apart,
    write_report,
)
from pltmoe.runtime.command_line import run_tool
from pltmoe.tracking.comparison import log_comparison
from pltmoe.tracking.mlflow import how_to_look
from pltmoe.tracking.sync import sync

log = logging.getLogger(__name__)


def main() -> None:
    """Parse the command line, write the report, hand it to MLflow."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--decode", type=Path, help="JSON of tools/benchmark_decode.py")
    parser.add_argument(
        "--evaluation",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="results.json of tools/evaluate.py for the run NAME; may be repeated",
    )
    parser.add_argument("--generated", type=Path, help="JSON of tools/generate.py")
    parser.add_argument("--title", default="Comparison of runs", type=printable)
    parser.add_argument(
        "--mlflow-uri",
        metavar="URI",
        default=os.environ.get("PLTMOE_MLFLOW_URI") or None,
        help="server or store to read and log to (default: PLTMOE_MLFLOW_URI, else none)",
    )
    args = parser.parse_args()
    # Nobody trains meanwhile: a slow server may take its time.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    evaluations = {}
    for item in args.evaluation:
        name, equals, file = item.partition("=")
        if not (name and equals and file):
            parser.error(f"--evaluation {item}: expected NAME=FILE")
        evaluations[name] = read_evaluation(Path(file))
    runs = tell_apart([_read(run, args.mlflow_uri) for run in args.runs])
    extras = Extras(
        read_decode(args.decode) if args.decode else {},
        read_generated(args.generated) if args.generated else [],
        evaluations,
    )
    report = write_report(runs, args.output, args.title, extras)
    print(f"report: {report}")
    folders = [Path(run) for run in args.runs if not run.startswith(MLFLOW_PREFIX)]
    if args.mlflow_uri:
        where = _log(runs, folders, args.mlflow_uri, args.output, note(runs, extras))
    else:
        where = next(filter(None, map(how_to_look, folders)), None)
    if where:
        print(f"MLflow: {where}")


def _read(run: str, uri: str | None) -> Run:
    if not run.startswith(MLFLOW_PREFIX):
        return read_run(Path(run))
    if uri is None:
        raise DataError(f"{run}: say where this run is with --mlflow-uri")
    return read_mlflow_run(uri, run.removeprefix(MLFLOW_PREFIX))


def _log(runs: list[Run], folders: list[Path], uri: str, output: Path, table: str) -> str:
    for folder in folders:
        try:
            sync(folder, uri)
        except DataError as error:  # a run that is still being sent is none of our business
            log.warning("%s", error)
    experiments = list(dict.fromkeys(run.config.tracking.experiment for run in runs))
    if len(experiments) > 1:
        print(
            f"the runs are in {len(experiments)} experiments; the report is in '{experiments[0]}'"
        )
    names = [run.name for run in runs]
    return log_comparison(uri, experiments[0], names, report_files(output), table)


if __name__ == "__main__":
    run_tool(main)
