"""Benchmark scores as lm-evaluation-harness writes them, and what is said about them."""

import json
from pathlib import Path

import pytest

from pltmoe.config import load_config
from pltmoe.errors import DataError
from pltmoe.reports import paper
from pltmoe.reports.glance import Extras
from pltmoe.reports.runs import Run, read_run
from pltmoe.reports.scores import PAPER_TASKS, common_tasks, read_evaluation
from pltmoe.reports.summary import write_report
from tests.repository import CONFIGS
from tests.unit.reports.logged_runs import cells, logged_run
from tests.unit.tracking.runs import PLT


def results_of(folder: Path, name: str, shift: float = 0.0, limit: int | None = None) -> Path:
    """A results file with the parts that the harness writes: a group, sub-tasks, two metrics."""
    tree = {
        "results": {
            "mmlu": {"acc,none": 0.30 + shift, "acc_stderr,none": 0.004, "alias": "mmlu"},
            "mmlu_law": {"acc,none": 0.10, "acc_stderr,none": 0.01, "alias": " - law"},
            "hellaswag": {"acc,none": 0.20, "acc_norm,none": 0.50 + shift, "alias": "hellaswag"},
            "local_perplexity": {"word_perplexity,none": 70.0, "bits_per_byte,none": 1.25},
            "gsm8k": {
                "exact_match,strict-match": 0.125,
                "exact_match_stderr,strict-match": 0.0,
                "exact_match,flexible-extract": 0.75,
            },
        },
        "groups": {"mmlu": {"acc,none": 0.30 + shift, "acc_stderr,none": 0.004}},
        "group_subtasks": {"mmlu": ["mmlu_law"], "mine": ["hellaswag", "gsm8k"]},
        "n-shot": {"mmlu": 5, "hellaswag": 0},
        "config": {"model": "hf", "limit": limit},
    }
    path = folder / f"{name}.json"
    path.write_text(json.dumps(tree))
    return path


def test_each_task_is_read_once_with_the_metric_that_counts(tmp_path):
    found = read_evaluation(results_of(tmp_path, "a"))
    assert {task: (s.metric, s.value) for task, s in found.tasks.items()} == {
        "mmlu": ("acc", 0.30),
        "hellaswag": ("acc_norm", 0.50),
        "gsm8k": ("exact_match", 0.125),
        "local_perplexity": ("bits_per_byte", 1.25),
    }
    assert found.tasks["mmlu"].error == 0.004 and found.tasks["mmlu"].shots == 5
    # A perplexity is no share of right answers: it has no place in an average.
    assert set(common_tasks([found])) == {"mmlu", "hellaswag", "gsm8k"}
    assert found.average(["mmlu", "hellaswag"]) == pytest.approx(40.0)


def test_the_average_is_over_what_all_have_or_the_papers_ten(tmp_path):
    path = results_of(tmp_path, "a")
    first = read_evaluation(path)
    tree = json.loads(path.read_text())
    del tree["results"]["gsm8k"]
    path.write_text(json.dumps(tree))
    assert set(common_tasks([first, read_evaluation(path)])) == {"mmlu", "hellaswag"}
    tree = {"results": {task: {"acc,none": 0.5} for task in (*PAPER_TASKS, "arc_easy")}}
    path.write_text(json.dumps(tree))
    assert common_tasks([read_evaluation(path)]) == list(PAPER_TASKS)


def test_scores_stand_in_the_report_beside_the_papers(tmp_path):
    kinds = {"vanilla": {}, "plt2": PLT, "plt2b": PLT}
    runs = [
        read_run(logged_run(tmp_path, name, **{f"model__{k}": v for k, v in changes.items()}))
        for name, changes in kinds.items()
    ]
    scores = {
        "vanilla": read_evaluation(results_of(tmp_path, "v")),
        "plt2": read_evaluation(results_of(tmp_path, "p", shift=0.06, limit=50)),
    }
    path = write_report(runs, tmp_path / "report", "t", Extras(evaluations=scores))
    average = cells(path, "average score, 3 tasks")
    assert average == ["30.8", "34.8", "not run", "62.1 → 62.6 (10 tasks)"]
    assert cells(path, "mmlu") == ["acc", "5", "30.0 ± 0.4", "36.0 ± 0.4", "not run"]
    assert cells(path, "local_perplexity")[2:] == ["1.250", "1.250", "not run"]
    assert cells(path, "benchmark scores") == [
        "4 tasks",
        "4 tasks, **only 50 samples each**",
        "not run",
    ]
    text = path.read_text()
    assert "Not comparable" not in text
    assert "not the paper's 10 benchmarks" in text and "![Benchmark scores](scores.png)" in text
    assert (path.parent / "scores.png").stat().st_size > 10_000
    other = json.loads(Path(scores["plt2"].source).read_text())
    other["n-shot"]["mmlu"] = 0
    Path(scores["plt2"].source).write_text(json.dumps(other))
    scores["plt2"] = read_evaluation(Path(scores["plt2"].source))
    path = write_report(runs, tmp_path / "report", "t", Extras(evaluations=scores))
    assert cells(path, "mmlu") == ["acc", "5 / 0", "30.0 ± 0.4", "36.0 ± 0.4", "not run"]
    assert "**Not comparable: mmlu.**" in path.read_text()
    assert cells(path, "average score, 2 tasks")[:3] == ["31.2", "34.2", "not run"]
    again = write_report(runs, tmp_path / "report", "t", Extras())
    assert not (again.parent / "scores.png").exists()  # what an earlier report drew is gone
    assert "Not run for any of the runs" in again.read_text()


def test_bad_results_are_named(tmp_path):
    path = tmp_path / "results.json"
    with pytest.raises(DataError, match="no results\\*.json in this folder"):
        read_evaluation(tmp_path)
    path.write_text("{")
    with pytest.raises(DataError, match="not a results file that can be read"):
        read_evaluation(path)
    path.write_text("[]")
    with pytest.raises(DataError, match="no 'results' of lm-evaluation-harness in it"):
        read_evaluation(path)
    path.write_text('{"results": {"mmlu": {"alias": "mmlu"}}}')
    with pytest.raises(DataError, match="not one task has a score"):
        read_evaluation(tmp_path)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (10**12, "models of the paper's two sizes"),
        (2 * 10**9, "saw 2.00 B tokens where the paper's"),
    ],
)
def test_the_papers_models_are_known_by_their_size_and_length(tokens, expected):
    configs = [load_config(CONFIGS / f"{n}.yaml") for n in ("plt_1.7b_40b", "vanilla_2.5b_60b")]
    runs = [Run(config, [{"step": 1, "tokens": tokens}], "here") for config in configs]
    assert expected in paper.statement(runs)
    assert "not the paper's models" in paper.statement(runs[:1])
