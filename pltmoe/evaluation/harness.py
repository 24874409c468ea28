"""Runs EleutherAI's lm-evaluation-harness on an exported model.

    tasks -> data sets there? -> load the data -> load the model -> evaluate -> results

In this order, because a large model takes minutes to load and a missing data set ends everything.
"""

import importlib.util
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pltmoe.errors import ConfigError, DataError
from pltmoe.evaluation.benchmarks import LISTS, Benchmark, by_task
from pltmoe.evaluation.downloads import check_downloaded

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager


@dataclass(frozen=True)
class EvaluationOptions:
    """What to evaluate, and how."""

    tasks: Sequence[str]
    """Names of lists (``local``, ``paper_moe``, ``paper_dense``) or tasks of the harness."""
    include: Sequence[Path] = ()
    """Folders with tasks in the harness' YAML format."""
    limit: int | None = None
    """Questions per task; scores are then only a check that it runs."""
    batch_size: int = 8
    device: str = "cpu"
    allow_code: bool = False
    """Run code that the model wrote (MBPP, HumanEval)."""


def require_harness() -> None:
    """Check that the optional package is there, and that it will not wait for other processes.

    Raises:
        ConfigError: it is not, or a launcher says that it has started several.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            "lm-evaluation-harness is not installed: pip install -e '.[eval]' in the repository"
        )
    if (size := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise ConfigError(
            f"environment variable WORLD_SIZE is {size}, and the evaluation is one process: start "
            "it without torchrun, or unset the variable"
        )


def choose(options: EvaluationOptions) -> list[Benchmark]:
    """Return the benchmarks of the named lists and tasks, once each, and check what they need.

    Raises:
        ConfigError: nothing chosen, no such task, or it runs code without leave.
        DataError: data sets are missing and cannot be fetched.
    """
    require_harness()
    known = by_task()
    chosen: dict[str, Benchmark] = {}
    for name in options.tasks:
        one = known.get(name, Benchmark(name, name, None, "", ()))
        chosen |= {b.task: b for b in LISTS.get(name, (one,))}
    if not chosen:
        raise ConfigError(f"--tasks: nothing named; one of {', '.join(LISTS)}, or tasks by name")
    strangers = [task for task in chosen if task not in known]
    chosen |= {task: _look_up(task, options) for task in strangers}
    benchmarks = list(chosen.values())
    if code := [b.task for b in benchmarks if b.runs_code and not options.allow_code]:
        rest = ",".join(b.task for b in benchmarks if not b.runs_code)
        raise ConfigError(
            f"{', '.join(code)}: runs code that the model wrote on this machine. Allow it with "
            f"--allow-code, in a container, or leave them out: --tasks {rest or 'OTHERS'}"
        )
    check_downloaded(name for b in benchmarks for name in b.datasets)
    return benchmarks


class PreparedTasks:
    """The tasks with their data, read once and used by the harness as they are."""

    def __init__(self, benchmarks: Sequence[Benchmark], options: EvaluationOptions) -> None:
        """Read the data of all tasks; fetches what is not in the cache.

        Raises:
            ConfigError: a task is in two of the benchmarks.
            DataError: a data set cannot be read, or a package that a task needs is missing.
        """
        if any(b.runs_code for b in benchmarks):
            os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # asked by the metric when it is loaded
        self.manager = _task_manager([b.task for b in benchmarks], options.include)
        self.benchmarks = list(benchmarks)
        self.loaded: dict[str, dict[str, Any]] = {"tasks": {}, "groups": {}, "group_map": {}}
        source: dict[str, str] = {}
        for benchmark in benchmarks:
            part = self._load(benchmark)
            for name, task in part["tasks"].items():
                if (other := source.setdefault(name, benchmark.task)) != benchmark.task:
                    raise ConfigError(
                        f"--tasks: {name} is part of {other} and of {benchmark.task}, and can run "
                        "only in one way; leave one out or evaluate it on its own"
                    )
                if benchmark.shots is not None:
                    task.set_config(key="num_fewshot", value=benchmark.shots)
            for kind, found in part.items():
                self.loaded[kind] |= found

    def _load(self, benchmark: Benchmark) -> Any:
        try:
            return self.manager.load([benchmark.task])
        except (OSError, ValueError, RuntimeError, ImportError) as error:
            text = " ".join(str(error).split())[:300]
            raise DataError(
                f"{benchmark.task}: its data cannot be read ({type(error).__name__}: {text}); "
                f"it needs {', '.join(benchmark.datasets) or 'no download'}"
            ) from error


def evaluate(model: Path, tasks: PreparedTasks, options: EvaluationOptions) -> dict[str, Any]:
    """Evaluate an exported folder, and return the harness' results.

    Raises:
        DataError: no exported model with its tokenizer in ``model``.
    """
    check_export(model)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    # The harness would load the tasks again after the model.
    tasks.manager.load = lambda names: tasks.loaded  # type: ignore[method-assign]
    language_model = HFLM(
        pretrained=str(model),
        backend="causal",
        device=options.device,
        batch_size=options.batch_size,
        trust_remote_code=True,
        softmax_dtype="float32",  # else the likelihoods of a bf16 model are bf16 numbers
    )
    results = simple_evaluate(
        model=language_model,
        tasks=[b.task for b in tasks.benchmarks],
        task_manager=tasks.manager,
        batch_size=options.batch_size,
        device=options.device,
        limit=options.limit,
        bootstrap_iters=1000,
        log_samples=False,
        confirm_run_unsafe_code=options.allow_code,
    )
    assert results is not None, "one process only"
    # The harness says it of a group of tasks, but not of a group of groups.
    for name, group in tasks.loaded["groups"].items():
        shots = {task.get_config("num_fewshot") for task in group.get_all_tasks()}
        results["n-shot"][name] = shots.pop() if len(shots) == 1 else None
    return results


def check_export(model: Path) -> None:
    """Check that a folder holds a model and its tokenizer.

    Raises:
        DataError: it does not.
    """
    for name in ("config.json", "tokenizer_config.json"):
        if not (model / name).is_file():
            raise DataError(
                f"{model}: no {name} here; export a checkpoint with its tokenizer: "
                "python tools/convert_to_hf.py --checkpoint RUN --output DIR"
            )


def max_positions(model: Path) -> int:
    """Return the slots of an exported model.

    Raises:
        DataError: no exported model there, or it does not say.
    """
    check_export(model)
    config = model / "config.json"
    try:
        return int(json.loads(config.read_text(encoding="utf-8"))["max_position_embeddings"])
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{config}: no max_position_embeddings to read ({error!r})") from None


def _task_manager(names: Iterable[str], include: Sequence[Path]) -> "TaskManager":
    """Return a manager that knows ``names``; the harness' own 13,000 tasks only when needed."""
    from lm_eval.tasks import TaskManager

    folders = [str(folder) for folder in include]
    own = TaskManager(include_path=folders, include_defaults=False)
    if all(name in own.task_index for name in names):
        return own
    return TaskManager(include_path=folders)


def _look_up(task: str, options: EvaluationOptions) -> Benchmark:
    """Describe a task that is in no list."""
    manager = _task_manager([task], options.include)
    if task not in manager.task_index:
        raise ConfigError(
            f"--tasks {task}: lm-evaluation-harness has no such task or group; its names: "
            "lm_eval ls tasks; the lists here: --list"
        )
    leaves = list(_leaves(task, manager.task_index))
    paths = {str(leaf.get("dataset_path")) for leaf in leaves}
    return replace(
        Benchmark(task, task, None, "", ()),
        datasets=tuple(sorted(path for path in paths if "/" in path)),
        runs_code=any(leaf.get("unsafe_code") for leaf in leaves),
    )


def _leaves(member: Any, index: dict[str, Any]) -> Iterable[dict[str, Any]]:
    """Yield the settings of every task of a task, tag, group, or list of them."""
    if isinstance(member, dict):
        member = member.get("task") or member.get("group")
    if isinstance(member, list):
        for item in member:
            yield from _leaves(item, index)
    elif (entry := index.get(str(member))) is not None:
        if entry.kind.name in ("GROUP", "TAG"):
            yield from _leaves(sorted(entry.tags) or (entry.cfg or {}).get("task", []), index)
        else:
            yield entry.cfg or {}
