"""Datasets on two ranks: one index cache, one order, one verdict."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pltmoe.data.datasets import batches, build_datasets
from pltmoe.data.tokenizer import Tokenizer
from pltmoe.data.tokenizer_training import TrainingOptions, train_tokenizer
from tests.unit.data.datasets import run_config, write_dataset

pytestmark = [pytest.mark.distributed, pytest.mark.xdist_group(__name__)]
READ = "tests.distributed.data_cases:read"


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    (tmp_path / "t.txt").write_text("some words to learn from, and more words\n" * 50)
    options = TrainingOptions(vocab_size=300)
    return train_tokenizer([tmp_path / "t.txt"], tmp_path / "t.model", options, progress=False)


def _sources(folder: Path, names: str) -> list[dict[str, Any]]:
    folder.mkdir()
    documents = [np.arange(20 + i, 70 + i) for i in range(30)]
    return [
        {"path": write_dataset(folder / name, [d + 100 * i for d in documents]), "weight": i + 1.0}
        for i, name in enumerate(names)
    ]


@pytest.mark.parametrize("names", ["a", "ab"], ids=["one source", "blend"])
def test_two_ranks_read_what_one_would_from_one_cache(
    tmp_path: Path, tokenizer: Tokenizer, warm_ranks: Callable[..., list[Any]], names: str
):
    data: dict[str, Any] = {"split": (90, 10, 0), "vocab_size": 300}
    sources = _sources(tmp_path / "two", names)
    first, second = warm_ranks(
        2, READ, model=tokenizer.model_path, train=sources, samples=(40, 4, 0), **data
    )
    assert all(first["from_cache"] + second["from_cache"]), "an index was built in memory"
    (cache,) = [path for path in (tmp_path / "two" / "index_cache").iterdir() if path.is_dir()]
    assert not cache.name.startswith(".")
    assert first["valid"] == second["valid"] >= 4

    sources = _sources(tmp_path / "one", names)
    config = run_config(tokenizer, sources, **data)
    train, _, _ = build_datasets(config, tokenizer, (40, 4, 0))
    alone = [
        batch["tokens"][0].tolist()
        for batch in batches(train, consumed_samples=0, micro_batch_size=1, dp_rank=0, dp_size=1)
    ]
    both = [row for pair in zip(first["tokens"], second["tokens"], strict=True) for row in pair]
    assert len(both) >= 40 and both == alone[: len(both)]


@pytest.mark.parametrize("fails", ["missing.bin: no such file", "too many sources for the 20"])
def test_every_rank_gets_the_same_error(
    tmp_path: Path, tokenizer: Tokenizer, warm_ranks: Callable[..., list[Any]], fails: str
):
    """Only rank 0 looks, and builds; the other must not wait at a barrier for ever."""
    train: Any = tmp_path / "missing"
    if "many" in fails:  # half of 20 sequences and one from each of 30 sources
        short = write_dataset(tmp_path / "short", [np.arange(20, 70)] * 3)
        train = [{"path": short, "weight": 30.0}] + [{"path": short}] * 30
    answers = warm_ranks(
        2, READ, timeout_s=60, model=tokenizer.model_path, train=train, samples=(20, 0, 0),
        vocab_size=300,
    )  # fmt: skip
    assert answers[0] == answers[1] and fails in answers[0]["error"]
