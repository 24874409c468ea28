"""What can be evaluated, and every way in which it is refused before a model is loaded."""

import json
import sys

import pytest

from pltmoe.errors import ConfigError, DataError, PLTMoEError
from pltmoe.evaluation import harness
from pltmoe.evaluation.benchmarks import LISTS, PAPER_DENSE, PAPER_MOE, Benchmark, describe_lists
from pltmoe.evaluation.downloads import check_downloaded, is_cached
from pltmoe.evaluation.harness import EvaluationOptions, PreparedTasks, check_export, choose
from pltmoe.evaluation.local_tasks import write_local_tasks
from pltmoe.evaluation.scores import scores_of
from pltmoe.tracking.journal import Journal
from pltmoe.tracking.scores import find_run, log_scores
from tests.repository import run_python, run_tool
from tools import evaluate

pytestmark = pytest.mark.xdist_group("evaluation")


@pytest.fixture
def empty_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "empty"))
    monkeypatch.delenv("HF_DATASETS_CACHE", raising=False)
    return tmp_path / "empty"


def test_the_lists_are_those_of_the_paper():
    names = "MMLU CEval AGIEval MMLU-Pro BBH DROP MBPP HumanEval MATH GSM8k"
    assert [b.name for b in PAPER_MOE] == names.split()
    names = "MMLU HellaSwag ARC-C ARC-E PIQA WinoGrande CommonsenseQA"
    assert [b.name for b in PAPER_DENSE] == names.split()
    table = describe_lists()
    for name, benchmarks in LISTS.items():
        assert name in table
        assert all(f"`{b.task}`" in table for b in benchmarks)


@pytest.fixture(scope="module")
def harness_tasks():
    """All of the harness' tasks; reading their 13,000 files takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def test_the_harness_has_every_benchmark_with_these_data_sets(harness_tasks):
    """Against the installed harness: names, data sets, what runs code, how many examples."""
    index = harness_tasks.task_index
    seen = set()
    for b in {*PAPER_MOE, *PAPER_DENSE}:
        leaves = list(harness._leaves(b.task, index))
        names = {leaf["task"] for leaf in leaves}
        assert leaves and not names & seen, (b.task, names & seen)
        seen |= names
        assert {leaf["dataset_path"] for leaf in leaves} == set(b.datasets), b.task
        assert any(leaf.get("unsafe_code") for leaf in leaves) == b.runs_code, b.task
        for leaf in leaves:
            assert leaf.get("num_fewshot") in (None, b.shots), b.task
            metrics = {m["metric"] for m in leaf["metric_list"] if isinstance(m["metric"], str)}
            named = any(b.metric.startswith(metric) for metric in metrics)
            assert named or leaf.get("unsafe_code"), (b.task, b.metric, metrics)


@pytest.mark.parametrize("name", ["paper_moe", "paper_dense"])
def test_a_paper_list_offline_is_one_error_with_all_data_sets(name, empty_cache, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DataError, match="have to be downloaded, and HF_HUB_OFFLINE is set") as seen:
        choose(EvaluationOptions([name], allow_code=True))
    for benchmark in LISTS[name]:
        assert all(dataset in str(seen.value) for dataset in benchmark.datasets)
    assert "--download" in str(seen.value)
    assert "\n" not in str(seen.value)


@pytest.mark.parametrize("hub", ["http://127.0.0.1:9", "hf-mirror.com", "http://127.0.0.1:x"])
def test_no_network_says_so(hub, empty_cache, monkeypatch):
    """Nor does what is no address."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_ENDPOINT", hub)
    with pytest.raises(DataError, match=f"{hub} does not answer"):
        check_downloaded(["Rowan/hellaswag", "Rowan/hellaswag"])


def test_what_is_in_the_cache_is_not_missing(empty_cache, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (empty_cache / "datasets/TIGER-Lab___mmlu-pro").mkdir(parents=True)
    assert is_cached("TIGER-Lab/MMLU-Pro")
    check_downloaded(["TIGER-Lab/MMLU-Pro"])
    with pytest.raises(DataError, match="cais/mmlu"):
        check_downloaded(["TIGER-Lab/MMLU-Pro", "cais/mmlu"])


def test_the_tool_ends_with_one_line_before_anything_is_loaded(empty_cache):
    """The folder of the model does not even exist."""
    words = ("--model", "nowhere", "--output", "x.json", "--tasks", "paper_dense")
    done = run_python("tools/evaluate.py", *words, HF_HUB_OFFLINE="1", HF_HOME=str(empty_cache))
    assert done.returncode == 1
    assert done.stderr.startswith("error: these data sets")
    assert done.stderr.count("\n") == 1
    assert "| GSM8k | `gsm8k` | 5 |" in run_tool("evaluate.py", "--list").stdout


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--model", "m"], "--output results.json must be given; see --help"),
        (["--output", "x.json"], "--model DIR must be given; see --help"),
        ([], "--output results.json and --model DIR must be given; see --help"),
        (["--tasks", "nothing", "--download"], "--tasks nothing: .* has no such task or group"),
        (["--model", "m", "--output", "."], r"\.: is a folder; name the file to write"),
        (["--model", "m", "--output", "x.md"], "names the JSON; the table goes to .md beside it"),
        (["--log-only", "--output", "x.json"], "--log-only, --mlflow-uri and --step need --run"),
        (["--model", "m", "--output", "x.json", "--step", "9"], "--step need --run"),
        (["--log-only", "--run", "r", "--output", "gone.json"], "gone.json: no results of this"),
    ],
)
def test_what_is_wrong_is_said(harness_tasks, monkeypatch, arguments, expected):
    """Before the folder of the model is looked at: there is none."""
    monkeypatch.setattr(evaluate, "find_run", lambda *run: None)
    monkeypatch.setattr(harness, "_task_manager", lambda names, include: harness_tasks)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--tasks", "local", *arguments])
    with pytest.raises(PLTMoEError, match=expected):
        evaluate.main()


def test_local_tasks_need_no_download(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--tasks", "local", "--download"])
    evaluate.main()
    assert capsys.readouterr().out == "0 tasks are ready\n"


def test_generated_code_needs_leave(empty_cache):
    with pytest.raises(ConfigError, match="runs code that the model wrote") as seen:
        choose(EvaluationOptions(["paper_moe"]))
    assert "--tasks mmlu,ceval-valid,agieval,mmlu_pro,bbh,drop,minerva_math,gsm8k" in str(
        seen.value
    )


def test_names_are_checked(monkeypatch, harness_tasks):
    monkeypatch.setattr(harness, "_task_manager", lambda names, include: harness_tasks)
    with pytest.raises(ConfigError, match="--tasks: nothing named; one of local"):
        choose(EvaluationOptions([]))
    with pytest.raises(ConfigError, match="has no such task or group"):
        choose(EvaluationOptions(["helaswag"]))
    monkeypatch.setenv("WORLD_SIZE", "2")  # the harness would wait for the other process
    with pytest.raises(ConfigError, match="WORLD_SIZE is 2, and the evaluation is one process"):
        choose(EvaluationOptions(["local"]))
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="lm-evaluation-harness is not installed"):
        choose(EvaluationOptions(["local"]))


def test_a_text_that_is_too_short_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("only these few words")
    with pytest.raises(DataError, match="too little text for questions: 0 passages"):
        write_local_tasks(tmp_path / "a.txt", tmp_path / "tasks", 128)
    assert not (tmp_path / "tasks").exists()
    words = [str(i) for i in range(56 * 4)]
    (tmp_path / "a.txt").write_text("\n".join(words))
    with pytest.raises(DataError, match="4 passages of 56 words, of which 0 can be cut at a space"):
        write_local_tasks(tmp_path / "a.txt", tmp_path / "tasks", 128)
    (tmp_path / "a.txt").write_text(" ".join(words))  # one document is enough
    write_local_tasks(tmp_path / "a.txt", tmp_path / "tasks", 128)


def test_shots_are_what_the_harness_says():
    one = Benchmark("A", "a", 5, "acc", ())
    results = {"results": {"a": {"acc,none": 0.5}}}
    assert [s.shots for s in scores_of(results, [one])] == [None]
    assert [s.shots for s in scores_of(results | {"n-shot": {"a": 3}}, [one])] == [3]


def test_a_folder_that_is_no_export_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"no config.json here; export a checkpoint"):
        check_export(tmp_path)
    (tmp_path / "tokenizer_config.json").touch()
    (tmp_path / "config.json").write_text('{"n_positions": 1024}')  # GPT-2, say
    with pytest.raises(DataError, match=r"config.json: no max_position_embeddings to read"):
        harness.max_positions(tmp_path)


def test_data_that_cannot_be_read_is_named(tmp_path):
    task = {"task": "broken", "dataset_path": "json", "output_type": "loglikelihood"}
    task |= {"dataset_kwargs": {"data_files": {"test": str(tmp_path / "gone.jsonl")}}}
    task |= {"test_split": "test", "doc_to_text": "", "doc_to_target": "text"}
    (tmp_path / "broken.yaml").write_text(json.dumps(task))
    options = EvaluationOptions(["broken"], include=[tmp_path])
    with pytest.raises(DataError, match="broken: its data cannot be read .*no download"):
        PreparedTasks(choose(options), options)


def test_runs_to_log_to_are_checked(tmp_path):
    with pytest.raises(ConfigError, match="is no run directory, so say where it is"):
        find_run("0123", None)
    with pytest.raises(ConfigError, match="is not in MLflow yet"):
        find_run(str(tmp_path), None)
    Journal(tmp_path).append("start", uri="http://127.0.0.1:9", attempt="a")
    Journal(tmp_path).save_state("http://127.0.0.1:9", {"run_id": "abc"})
    assert find_run(str(tmp_path), None) == ("http://127.0.0.1:9", "abc")
    with pytest.raises(DataError, match="does not take the scores .*--log-only"):
        log_scores("http://127.0.0.1:9", "abc", {"eval/a": 1.0}, [tmp_path / "r.json"])
