"""Evaluate an exported model with lm-evaluation-harness (pip install -e '.[eval]').

python tools/evaluate.py --model DIR --tasks local --text valid.jsonl --output results.json
python tools/evaluate.py --model DIR --tasks paper_dense --output results.json --run work/run

``local`` is made from --text and needs no network. The paper's lists read data sets of
huggingface.co (--list names them): fetch them once with --download.
"""

import argparse
import json
import tempfile
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch

from pltmoe.errors import ConfigError, DataError
from pltmoe.evaluation.benchmarks import LISTS, describe_lists
from pltmoe.evaluation.harness import (
    EvaluationOptions,
    PreparedTasks,
    check_export,
    choose,
    evaluate,
    max_positions,
)
from pltmoe.evaluation.local_tasks import write_local_tasks
from pltmoe.evaluation.scores import (
    Score,
    as_markdown,
    as_metrics,
    scores_of,
    write_results,
)
from pltmoe.hf.code_cache import check_code_cache
from pltmoe.hf.folder_tensors import read_json
from pltmoe.runtime.command_line import output_file, positive, run_tool
from pltmoe.tracking.scores import find_run, log_scores


def main() -> None:
    """Parse the command line and evaluate."""
    args = _parser().parse_args()
    if args.list:
        print(describe_lists(), end="")
        return
    needed = [] if args.download else ["--output results.json"]
    needed += [] if args.download or args.log_only else ["--model DIR"]
    if missing := [n for n in needed if getattr(args, n.split()[0].removeprefix("--")) is None]:
        raise ConfigError(f"{' and '.join(missing)} must be given; see --help")
    if args.run is None and (args.log_only or args.mlflow_uri or args.step):
        raise ConfigError("--log-only, --mlflow-uri and --step need --run, the run to log to")
    if args.output is not None and args.output.suffix == ".md":
        raise ConfigError(
            f"--output {args.output}: names the JSON; the table goes to .md beside it"
        )
    target = find_run(args.run, args.mlflow_uri) if args.run else None
    if not args.log_only:
        with _local_folder(args) as folder:
            scores = _evaluate(args, Path(folder))
        if scores is None:
            return
    else:
        scores = _read_scores(args.output)
    if target is not None:
        files = [args.output, args.output.with_suffix(".md")]
        log_scores(*target, as_metrics(scores), files, args.step)
        print(f"logged to run {target[1]}")


def _evaluate(args: argparse.Namespace, local: Path) -> list[Score] | None:
    options = EvaluationOptions(
        tasks=[name for name in args.tasks.split(",") if name],
        include=args.include,
        limit=args.limit,
        batch_size=args.batch_size,
        device=args.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        allow_code=args.allow_code,
    )
    benchmarks = choose(options)
    if args.download:
        benchmarks = [b for b in benchmarks if b not in LISTS["local"]]
    else:
        check_export(args.model)
        check_code_cache(read_json(args.model / "config.json"))
    if any(b in LISTS["local"] for b in benchmarks):
        if args.text is None:
            raise ConfigError("--tasks local: is made from a text of yours: --text FILE")
        write_local_tasks(args.text, local, max_positions(args.model), args.json_key)
        options = replace(options, include=[*options.include, local])
    tasks = PreparedTasks(benchmarks, options)
    if args.download:
        print(f"{len(tasks.loaded['tasks'])} tasks are ready")
        return None
    results = evaluate(args.model, tasks, options)
    scores = scores_of(results, benchmarks)
    table = as_markdown(str(args.model), scores, args.limit)
    write_results(results, scores, table, args.output)
    print(table, end="")
    return scores


def _read_scores(results: Path) -> list[Score]:
    try:
        return [Score(**row) for row in json.loads(results.read_text(encoding="utf-8"))["scores"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{results}: no results of this tool to read ({type(error).__name__}: {error}); "
            "run it without --log-only"
        ) from None


def _local_folder(args: argparse.Namespace) -> AbstractContextManager[Path | str]:
    if args.local_dir is not None:
        return nullcontext(args.local_dir)
    return tempfile.TemporaryDirectory(prefix="pltmoe_evaluation_")


def _parser() -> argparse.ArgumentParser:
    default = EvaluationOptions(tasks=())
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--list", action="store_true", help="print the lists and end")
    parser.add_argument("--model", type=Path, metavar="DIR", help="made by tools/convert_to_hf.py")
    parser.add_argument(
        "--tasks",
        default="local",
        help=f"{', '.join(LISTS)}, or tasks of the harness: A,B,... (local)",
    )
    parser.add_argument(
        "--output", type=output_file, help="JSON to write; a table goes to .md beside it"
    )
    parser.add_argument(
        "--text",
        type=Path,
        help="what the local tasks are made of: a text file (one document), JSONL (one a line) or "
        "a folder of them",
    )
    parser.add_argument("--json-key", default="text", help="where the text is in a JSONL line")
    parser.add_argument("--local-dir", type=Path, help="keep the local tasks in this folder")
    parser.add_argument(
        "--include", type=Path, action="append", default=[], help="folder with tasks of your own"
    )
    parser.add_argument("--limit", type=positive, help="questions per task, to try something out")
    parser.add_argument(
        "--batch-size", type=int, default=default.batch_size, help="default %(default)s"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...; default: cuda where there is one")
    parser.add_argument("--allow-code", action="store_true", help="run code the model wrote, here")
    parser.add_argument("--download", action="store_true", help="fetch the data sets and end")
    parser.add_argument("--run", help="MLflow run id, or directory of the run: log the scores")
    parser.add_argument("--mlflow-uri", metavar="URI", help="where --run is (if no directory)")
    parser.add_argument("--step", type=int, default=0, help="training step that the scores are of")
    parser.add_argument("--log-only", action="store_true", help="log what --output holds already")
    return parser


if __name__ == "__main__":
    run_tool(main)
