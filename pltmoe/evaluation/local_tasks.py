"""Three tasks for lm-evaluation-harness from any text: no download, no network.

    local_perplexity     how well each whole document is predicted: per word, per byte
    local_last_word      the last word of a passage, greedily, as LAMBADA asks for it
    local_continuation   which of four pieces of the text comes next; guessing gives 0.25

What is asked for begins with a space. Tokenizers join a newline to the word before it, but begin a
new piece at a space: so the tokens of context and answer begin with the context's, and what the
harness scores is the answer, all of it and nothing else.

They are written in the harness' own format (YAML and JSONL), so that its command line can run the
folder too: ``lm_eval --include_path DIR --tasks local_perplexity``.
"""

import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pltmoe.data.sources import FileSlice, find_inputs, read_documents
from pltmoe.errors import DataError

MAX_QUESTIONS = 500
CHOICES = 4
_PASSAGE_WORDS = 56
_CHOICE_WORDS = 8
_CHOICE_BYTES = 96
_LAST_WORD_BYTES = 24

_METRICS: dict[str, list[dict[str, Any]]] = {
    "local_perplexity": [
        {"metric": name, "aggregation": way, "higher_is_better": False}
        for name, way in (
            ("word_perplexity", "weighted_perplexity"),
            ("byte_perplexity", "weighted_perplexity"),
            ("bits_per_byte", "bits_per_byte"),
        )
    ],
    "local_last_word": [
        {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
    ],
    "local_continuation": [
        {"metric": name, "aggregation": "mean", "higher_is_better": True}
        for name in ("acc", "acc_norm")
    ],
}
_ASKS: dict[str, dict[str, Any]] = {
    "local_perplexity": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "text",
    },
    "local_last_word": {
        "output_type": "loglikelihood",
        "doc_to_text": "context",
        "doc_to_target": "target",
    },
    "local_continuation": {
        "output_type": "multiple_choice",
        "doc_to_text": "context",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
    },
}


@dataclass(frozen=True)
class _Passage:
    """Some words of a document, cut before the last word and before the last few."""

    text: str
    before_last: str
    before_choice: str

    @property
    def last_word(self) -> str:
        """The last word with the space before it."""
        return self.text[len(self.before_last) :]

    @property
    def end(self) -> str:
        """The few words before the last one, with the space before them.

        Without the last one: no two requests may be the same text cut at different places, for
        the harness (0.4.13, ``logits_cache``) then answers one with a slice of the other.
        """
        return self.text[len(self.before_choice) : len(self.before_last)]


def write_local_tasks(text: Path, folder: Path, max_positions: int, json_key: str = "text") -> None:
    """Write the tasks and their data to ``folder``.

    Args:
        text: a text or JSONL file, also compressed, or a folder of them.
        folder: is made when it is not there.
        max_positions: slots of the model. An answer takes at most half of them (a token is never
            less than a byte), so below 192 the pieces to choose from are shorter.
        json_key: where the text is in a line of JSONL.

    Raises:
        DataError: unreadable, or too little text to make questions from.
    """
    documents = [d for d in _documents(text, json_key) if d.strip()]
    passages = [p for document in documents for p in _passages(document)]
    limit = min(_CHOICE_BYTES, max_positions // 2)
    questions = {
        "local_last_word": _last_words(passages, min(_LAST_WORD_BYTES, limit)),
        "local_continuation": _continuations(passages, limit),
    }
    if (fewest := min(map(len, questions.values()))) < CHOICES:
        raise DataError(
            f"{text}: too little text for questions: {len(passages)} passages of {_PASSAGE_WORDS} "
            f"words, of which {fewest} can be cut at a space and are not too long; at least "
            f"{CHOICES} are needed; give a longer text"
        )
    folder.mkdir(parents=True, exist_ok=True)
    _write_task(folder, "local_perplexity", [{"text": document} for document in documents])
    for task, lines in questions.items():
        _write_task(folder, task, lines)


def _documents(text: Path, json_key: str) -> Iterator[str]:
    for file in find_inputs([text]):
        yield from read_documents(FileSlice(file), json_key, lambda size: None)


def _passages(document: str) -> Iterator[_Passage]:
    words = list(re.finditer(r"\S+", document))
    for first in range(0, len(words) - _PASSAGE_WORDS + 1, _PASSAGE_WORDS):
        begin = words[first].start()
        *body, before_last, last = words[first : first + _PASSAGE_WORDS]
        yield _Passage(
            text=document[begin : last.end()],
            before_last=document[begin : before_last.end()],
            before_choice=document[begin : body[-_CHOICE_WORDS].end()],
        )


def _spread(items: list[_Passage]) -> list[_Passage]:
    """Return at most MAX_QUESTIONS of them, from all over the text."""
    step = max(1.0, len(items) / MAX_QUESTIONS)
    return [items[int(i * step)] for i in range(min(len(items), MAX_QUESTIONS))]


def _last_words(passages: list[_Passage], max_bytes: int) -> list[dict[str, Any]]:
    usable = [
        p
        for p in passages
        if p.last_word.startswith(" ") and len(p.last_word.encode()) <= max_bytes
    ]
    return [{"context": p.before_last, "target": p.last_word} for p in _spread(usable)]


def _continuations(passages: list[_Passage], max_bytes: int) -> list[dict[str, Any]]:
    draw = random.Random(0)
    rows = []
    passages = [p for p in passages if p.end.startswith(" ") and _cut(p.end, max_bytes).strip()]
    ends = sorted({_cut(p.end, max_bytes) for p in passages})
    if len(ends) < CHOICES:
        return []
    for passage in _spread(passages):
        right = _cut(passage.end, max_bytes)
        others = draw.sample(ends, CHOICES)
        choices = [right, *[end for end in others if end != right][: CHOICES - 1]]
        draw.shuffle(choices)
        row = {"context": passage.before_choice, "choices": choices}
        rows.append(row | {"answer": choices.index(right)})
    return rows


def _cut(text: str, max_bytes: int) -> str:
    return text.encode()[:max_bytes].decode(errors="ignore")


def _write_task(folder: Path, task: str, rows: list[dict[str, Any]]) -> None:
    data = folder.absolute() / f"{task}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = {
        "task": task,
        "dataset_path": "json",
        # The reader's copies go with the folder, not into the user's cache.
        "dataset_kwargs": {
            "data_files": {"test": str(data)},
            "cache_dir": str(folder.absolute() / "cache"),
        },
        "test_split": "test",
        "target_delimiter": "",
        "num_fewshot": 0,
        **_ASKS[task],
        "metric_list": _METRICS[task],
        "metadata": {"version": 1.0},
    }
    (folder / f"{task}.yaml").write_text(
        yaml.safe_dump(settings, sort_keys=False), encoding="utf-8"
    )
