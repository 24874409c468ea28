"""The harness on real exports: its perplexity is the model's, and nothing needs a network."""

import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from pltmoe.errors import ConfigError
from pltmoe.evaluation.harness import EvaluationOptions, PreparedTasks, choose, evaluate
from pltmoe.evaluation.local_tasks import write_local_tasks
from pltmoe.evaluation.scores import as_markdown, as_metrics, scores_of
from tests.repository import REPOSITORY, run_python, run_tool
from tests.unit.evaluation.conftest import SLOTS

pytestmark = pytest.mark.xdist_group("evaluation")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of source code, of which the tokenizer has pieces like a bracket with a newline."""
    lines = (REPOSITORY / "tests/unit/hf/test_generation.py").read_text().splitlines(True)
    file = tmp_path_factory.mktemp("text") / "valid.jsonl"
    pieces = ["".join(lines[i : i + 35]) for i in range(0, len(lines), 35)]
    file.write_text("".join(json.dumps({"text": piece}) + "\n" for piece in pieces))
    return file


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def documents(text: Path) -> list[str]:
    return [line["text"] for line in read(text)]


def log_likelihood(folder: Path, context: list[int], target: list[int]) -> float:
    """The model itself, one sequence at a time: no harness, no batch, no padding; sums in fp32."""
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    ids = torch.tensor([context + target])
    with torch.no_grad():
        log_p = model(ids[:, :-1]).logits[0].float().log_softmax(-1)
    chosen = log_p.gather(1, ids[0, 1:, None])[:, 0]
    return float(chosen[-len(target) :].sum())


def encode_pair(tokenizer, context: str, target: str) -> tuple[list[int], list[int]]:
    """Tokens of both in one piece: none of them lies on both sides of the border."""
    whole = tokenizer.encode(context + target, add_special_tokens=False)
    before = tokenizer.encode(context, add_special_tokens=False)
    assert whole[: len(before)] == before, (context[-20:], target)
    assert tokenizer.decode(whole[len(before) :]) == target
    return before, whole[len(before) :]


def run(folder: Path, text: Path, where: Path, batch_size: int = 3, **changes):
    write_local_tasks(text, where, SLOTS)
    options = EvaluationOptions(
        tasks=changes.pop("tasks", ["local"]), include=[where], batch_size=batch_size, **changes
    )
    tasks = PreparedTasks(choose(options), options)
    results = evaluate(folder, tasks, options)
    return scores_of(results, tasks.benchmarks)


@pytest.mark.parametrize(("name", "batch_size"), [("plt2", 3), ("vanilla", 1)])
def test_scores_are_those_of_the_model_itself(name, batch_size, exports, text, tmp_path):
    """Per byte and word on every document; the last word and the choice on every question.

    In bf16 (vanilla) one at a time: in a batch even the logits are rounded in another way.
    """
    folder = exports[name]
    scores = run(folder, text, tmp_path, batch_size)
    value = {(s.task, s.metric): s.value for s in scores}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = documents(text)
    ids = [tokenizer.encode(t, add_special_tokens=False) for t in texts]
    prefix = [tokenizer.eos_token_id]  # what training puts before a document
    nats = -sum(log_likelihood(folder, prefix, tokens) for tokens in ids)
    size = sum(len(t.encode()) for t in texts)
    bits = nats / size / math.log(2)
    assert value["local_perplexity", "bits_per_byte"] == pytest.approx(bits, rel=1e-5)
    assert value["local_perplexity", "byte_perplexity"] == pytest.approx(2**bits, rel=1e-5)
    words = sum(len(t.split()) for t in texts)
    found = math.log(value["local_perplexity", "word_perplexity"])
    assert found == pytest.approx(nats / words, rel=0.02)  # the harness counts empty words too

    questions = read(tmp_path / "local_continuation.jsonl")
    right = 0
    for question in questions:
        answers = [
            log_likelihood(folder, *encode_pair(tokenizer, question["context"], choice))
            for choice in question["choices"]
        ]
        right += answers.index(max(answers)) == question["answer"]
    assert value["local_continuation", "acc"] == pytest.approx(right / len(questions))
    last = read(tmp_path / "local_last_word.jsonl")
    pairs = [encode_pair(tokenizer, q["context"], q["target"]) for q in last]
    mean = sum(log_likelihood(folder, *pair) for pair in pairs) / len(pairs)
    assert value["local_last_word", "perplexity"] == pytest.approx(math.exp(-mean), rel=1e-4)
    assert as_metrics(scores)["eval/local_continuation/acc"] == right / len(questions)
    assert f"| local_perplexity | 0 | bits_per_byte | {bits:.4f} |" in as_markdown(
        "x", scores, None
    )
    assert "not comparable" in as_markdown("x", scores, 5)


def test_questions_are_fair(text, tmp_path):
    """The right piece follows its context in the text, is there once, and its place varies."""
    write_local_tasks(text, tmp_path, SLOTS)
    questions = read(tmp_path / "local_continuation.jsonl")
    whole = "\n".join(documents(text))
    for question in questions:
        assert len(set(question["choices"])) == 4
        assert question["context"] + question["choices"][question["answer"]] in whole
    assert len({question["answer"] for question in questions}) > 1
    for question in read(tmp_path / "local_last_word.jsonl"):
        assert question["context"] + question["target"] in whole
        assert len(question["target"].split()) == 1
    before = (tmp_path / "local_continuation.jsonl").read_text()
    write_local_tasks(text, tmp_path / "again", SLOTS)
    assert (tmp_path / "again/local_continuation.jsonl").read_text() == before


def test_a_task_and_a_group_of_the_users_own(exports, text, tmp_path):
    """``generate_until`` pads on the left and decodes in batches. A group says what its tasks had,
    also one of groups, and no task is in two of what is evaluated.
    """
    write_local_tasks(text, tmp_path, SLOTS)
    settings = yaml.safe_load((tmp_path / "local_last_word.yaml").read_text())
    settings |= {
        "task": "my_generation",
        "output_type": "generate_until",
        "metric_list": [{"metric": "exact_match"}],
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4, "do_sample": False},
    }
    (tmp_path / "my_generation.yaml").write_text(yaml.safe_dump(settings))
    mean = {"aggregate_metric_list": [{"metric": "acc"}]}
    inner = {"group": "inner", "task": ["local_last_word", "local_continuation"]} | mean
    outer = {"group": "outer", "task": ["inner"]} | mean
    for group in (inner, outer):
        (tmp_path / f"{group['group']}.yaml").write_text(yaml.safe_dump(group))
    scores = run(exports["plt2"], text, tmp_path, tasks=["my_generation", "outer"], limit=3)
    assert [(s.task, s.questions) for s in scores] == [("my_generation", 3), ("outer", None)]
    assert [s.shots for s in scores] == [0, 0]
    options = EvaluationOptions(["outer", "local_last_word"], include=[tmp_path])
    expected = "--tasks: local_last_word is part of outer and of local_last_word, and can run only"
    with pytest.raises(ConfigError, match=expected):
        PreparedTasks(choose(options), options)


def test_local_tasks_need_a_text(exports, tmp_path):
    arguments = ("--tasks", "local", "--model", exports["plt2"], "--output", tmp_path / "x.json")
    done = run_tool("evaluate.py", *arguments)
    assert "error: --tasks local: is made from a text of yours: --text FILE" in done.stderr
    assert done.returncode == 1


def test_the_tool_works_without_a_network_and_logs_to_the_run(exports, text, tmp_path):
    """Local list, HF_HUB_OFFLINE, scores into a run in SQLite that a run directory belongs to."""
    from pltmoe.tracking.delivery import Delivery
    from pltmoe.tracking.mlflow import MLflowTracker
    from tests.unit.tracking.runs import run_config

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "metrics.jsonl").write_text("")
    MLflowTracker(run_config(run_dir, uri), run_dir).record_start({}, None)
    Delivery(run_dir, uri).deliver()
    out = tmp_path / "out/results.json"
    options = ("--tasks", "local", "--text", text, "--limit", 5, "--step", 7, "--run", run_dir)
    where = ("--model", exports["plt2"], "--output", out)
    done = run_python("tools/evaluate.py", *where, *options, HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    kept = json.loads(out.read_text())
    assert kept["results"]["local_perplexity"]["bits_per_byte,none"] > 0
    assert "| local_continuation | 0 | acc |" in out.with_suffix(".md").read_text()

    from mlflow.tracking import MlflowClient

    from pltmoe.tracking.journal import Journal

    client, run_id = MlflowClient(uri), Journal(run_dir).state(uri)["run_id"]
    (point,) = client.get_metric_history(run_id, "eval/local_perplexity/bits_per_byte")
    assert point.value == kept["results"]["local_perplexity"]["bits_per_byte,none"]
    assert point.step == 7
    files = {file.path for file in client.list_artifacts(run_id, "evaluation")}
    assert files == {"evaluation/results.json", "evaluation/results.md"}
