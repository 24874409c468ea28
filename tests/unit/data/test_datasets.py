"""What training reads: checked, contiguous, mixed by weight, in an order that survives anything."""

import hashlib
import itertools
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pltmoe.data import datasets as module
from pltmoe.data.datasets import batches, build_datasets
from pltmoe.data.indexed import idx_path
from pltmoe.data.tokenizer import Tokenizer
from pltmoe.errors import DataError
from tests.unit.data.datasets import (
    SEQUENCE,
    Numbers,
    all_batches,
    run_config,
    tokens_of,
    write_dataset,
)


def test_batches_have_what_the_model_takes(tokenizer: Tokenizer, counting: Path):
    train, valid, test = build_datasets(run_config(tokenizer, counting), tokenizer, (30, 0, 0))
    assert valid is None and test is None and len(train) >= 30
    batch = all_batches(train, micro_batch_size=3)[0]
    assert set(batch) == {"tokens", "labels", "loss_mask", "position_ids"}
    assert "attention_mask" not in train[0], "an s x s mask is made for each sequence"
    for key, dtype in (
        ("tokens", torch.int64),
        ("labels", torch.int64),
        ("loss_mask", torch.float32),
    ):
        assert batch[key].shape == (3, SEQUENCE) and batch[key].dtype == dtype
    assert batch["position_ids"].dtype == torch.int64
    assert batch["position_ids"].tolist() == [list(range(SEQUENCE))] * 3
    assert batch["loss_mask"].eq(1).all()


def test_labels_are_the_next_tokens_of_contiguous_text(tokenizer: Tokenizer, tmp_path: Path):
    one = [10 + np.arange(3000) % 500]
    config = run_config(tokenizer, write_dataset(tmp_path / "one", one))
    train, _, _ = build_datasets(config, tokenizer, (150, 0, 0))
    for batch in all_batches(train):
        assert torch.equal(batch["labels"][:, :-1], batch["tokens"][:, 1:])
        assert torch.equal(batch["labels"], (batch["tokens"] - 10 + 1) % 500 + 10)


def test_every_token_of_an_epoch_is_a_label_once(tokenizer: Tokenizer, tmp_path: Path):
    one = [10 + np.arange(10 * SEQUENCE + 1)]
    config = run_config(tokenizer, write_dataset(tmp_path / "one", one))
    train, _, _ = build_datasets(config, tokenizer, (10, 0, 0))
    labels = torch.cat([batch["labels"].flatten() for batch in all_batches(train)])
    assert sorted(labels.tolist()) == list(range(11, 11 + 10 * SEQUENCE))


def test_positions_restart_and_loss_is_masked_on_request(tokenizer: Tokenizer, counting: Path):
    config = run_config(tokenizer, counting, reset_position_ids=True, mask_document_ends=True)
    train, _, _ = build_datasets(config, tokenizer, (100, 0, 0))
    seen = 0
    for batch in all_batches(train):
        ends = batch["tokens"] == tokenizer.eod
        seen += int(ends.sum())
        assert torch.equal(batch["loss_mask"], 1.0 - ends.float())
        starts = ends.roll(1, dims=1)
        starts[:, 0] = True
        assert torch.equal(batch["position_ids"] == 0, starts)
        steps = batch["position_ids"].diff(dim=1)
        assert steps[~starts[:, 1:]].eq(1).all()
    assert seen > 10


def test_blend_respects_weights(tokenizer: Tokenizer, tmp_path: Path):
    """In every stretch of the order, not only on the whole."""
    sources = []
    for i, weight in enumerate((3.0, 1.0, 6.0)):
        prefix = write_dataset(tmp_path / str(i), [np.full(200, 100 + i)] * 30)
        sources.append({"path": prefix, "weight": weight})
    train, _, _ = build_datasets(run_config(tokenizer, sources), tokenizer, (400, 0, 0))
    origin = np.array([row[0] - 100 for row in tokens_of(all_batches(train))])
    assert len(origin) >= 400
    for stretch in (origin[:40], origin[100:200], origin[:400]):
        counts = np.bincount(stretch, minlength=3)
        assert np.abs(counts - len(stretch) * np.array([0.3, 0.1, 0.6])).max() <= 2


def test_split_cuts_by_documents_without_overlap(tokenizer: Tokenizer, tmp_path: Path):
    prefix = write_dataset(tmp_path / "x", [np.full(64, 100 + i) for i in range(100)])
    config = run_config(tokenizer, prefix, split=(80, 15, 5))
    sets = build_datasets(config, tokenizer, (100, 20, 5))
    seen = [{t for row in tokens_of(all_batches(found)) for t in row} for found in sets]
    assert not seen[0] & seen[1] and not seen[1] & seen[2] and not seen[0] & seen[2]
    assert max(seen[0]) < 180 <= min(seen[1]) and max(seen[1]) < 195 <= min(seen[2])


def test_split_of_a_blend(tokenizer: Tokenizer, tmp_path: Path):
    sources = [
        {
            "path": write_dataset(
                tmp_path / str(i), [np.full(64, 100 * (i + 1) + d) for d in range(50)]
            )
        }
        for i in range(2)
    ]
    config = run_config(tokenizer, sources, split=(90, 10, 0))
    train, valid, test = build_datasets(config, tokenizer, (60, 10, 0))
    assert test is None
    for found, allowed in ((train, range(45)), (valid, range(45, 50))):
        tokens = {t for row in tokens_of(all_batches(found)) for t in row}
        assert {t % 100 for t in tokens} <= set(allowed)
        assert {t // 100 for t in tokens} == {1, 2}


def test_own_validation_sources(tokenizer: Tokenizer, counting: Path, tmp_path: Path):
    other = write_dataset(tmp_path / "other", [np.full(100, 7)] * 5)
    config = run_config(tokenizer, counting, valid=[{"path": other}])
    train, valid, _ = build_datasets(config, tokenizer, (20, 8, 0))
    assert {t for row in tokens_of(all_batches(valid)) for t in row} == {7}
    assert 7 not in {t for row in tokens_of(all_batches(train)) for t in row}


def test_too_little_text_is_repeated(tokenizer: Tokenizer, counting: Path):
    train, _, _ = build_datasets(run_config(tokenizer, counting), tokenizer, (500, 0, 0))
    assert len(tokens_of(all_batches(train))) >= 500


def test_a_mix_of_too_many_sources_is_refused(tokenizer: Tokenizer, tmp_path: Path):
    """Half of 20 sequences and one from each of 30 sources are 40, and half of those 20."""
    weights = [0.5] + 30 * [0.5 / 30]
    sources = [
        {"path": write_dataset(tmp_path / str(i), [np.full(50, 7)] * 3), "weight": weight}
        for i, weight in enumerate(weights)
    ]
    config = run_config(tokenizer, sources)
    with pytest.raises(DataError, match="too many sources for the 20 sequences of 'train'"):
        build_datasets(config, tokenizer, (20, 0, 0))
    assert len(build_datasets(config, tokenizer, (31 * 200, 0, 0))[0]) >= 31 * 200


def test_seed_decides_the_order(tokenizer: Tokenizer, counting: Path):
    orders = []
    for seed in (1, 1, 2):
        config = run_config(tokenizer, counting, seed=seed)
        orders.append(tokens_of(all_batches(build_datasets(config, tokenizer, (50, 0, 0))[0])))
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) != orders[0], "not shuffled"


@settings(max_examples=60, deadline=None)
@given(
    micro=st.integers(1, 3),
    dp_size=st.sampled_from([1, 2, 3, 4]),
    accumulation=st.integers(1, 3),
    steps_done=st.integers(0, 3),
)
def test_a_step_has_the_same_sequences_for_every_layout(
    micro: int, dp_size: int, accumulation: int, steps_done: int
):
    """Step k of a global batch of g sequences holds sequences k g .. (k + 1) g - 1, once each."""
    total, step = 60, micro * dp_size * accumulation
    ranks = [
        batches(
            Numbers(total),
            consumed_samples=steps_done * step,
            micro_batch_size=micro,
            dp_rank=rank,
            dp_size=dp_size,
        )
        for rank in range(dp_size)
    ]
    for k in range(steps_done, total // step):
        found = [
            int(i)
            for rank in ranks
            for batch in itertools.islice(rank, accumulation)
            for i in batch["tokens"]
        ]
        assert sorted(found) == list(range(k * step, (k + 1) * step))


def test_same_global_order_for_one_and_two_ranks_and_after_a_resume(
    tokenizer: Tokenizer, counting: Path
):
    train, _, _ = build_datasets(run_config(tokenizer, counting), tokenizer, (40, 0, 0))
    alone = tokens_of(all_batches(train, micro_batch_size=1))
    both: list[list[int]] = []
    ranks = (all_batches(train, dp_rank=rank, dp_size=2) for rank in range(2))
    for a, b in zip(*ranks, strict=True):
        both += a["tokens"].tolist() + b["tokens"].tolist()
    assert both == alone[: len(both)] and len(both) >= 40
    assert tokens_of(all_batches(train, consumed_samples=10, micro_batch_size=1)) == alone[10:]


def test_workers_change_neither_order_nor_random_state(tokenizer: Tokenizer, counting: Path):
    """DataLoader draws a seed from the global state unless told otherwise, workers or not."""
    train, _, _ = build_datasets(run_config(tokenizer, counting), tokenizer, (20, 0, 0))
    state = torch.get_rng_state()
    plain = tokens_of(all_batches(train))
    assert tokens_of(all_batches(train, num_workers=2)) == plain
    assert torch.equal(torch.get_rng_state(), state)


def test_ends_with_the_last_complete_row_of_micro_batches():
    for rank in range(2):
        assert len(all_batches(Numbers(11), micro_batch_size=2, dp_rank=rank, dp_size=2)) == 2
    assert all_batches(Numbers(4), consumed_samples=9) == []


def test_index_is_built_once(tokenizer: Tokenizer, counting: Path, tmp_path: Path, monkeypatch):
    config = run_config(tokenizer, counting, cache_dir=tmp_path / "cache")
    first = tokens_of(all_batches(build_datasets(config, tokenizer, (20, 0, 0))[0]))
    (folder,) = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    assert not folder.name.startswith(".")
    monkeypatch.setattr(module, "_rename_folder", None)
    assert tokens_of(all_batches(build_datasets(config, tokenizer, (20, 0, 0))[0])) == first


def test_an_index_is_read_once_for_all_parts(tokenizer: Tokenizer, counting: Path, monkeypatch):
    read: list[Path] = []
    monkeypatch.setattr(module, "sha256_of", lambda path: read.append(path) or "0" * 64)
    build_datasets(run_config(tokenizer, counting, split=(80, 20, 0)), tokenizer, (20, 4, 0))
    assert read == [idx_path(counting)]


def test_whatever_decides_the_index_gives_it_another_folder(tokenizer: Tokenizer, counting: Path):
    """Where a folder is there, every rank writes what it lacks into it, at the same time."""
    changes = ({}, {"seed": 2}, {"sequence_length": 8}, {"split": (9, 1, 0)})
    configs = [run_config(tokenizer, counting, **change) for change in changes]
    found = {module._cache_folder(c, tokenizer, (20, 0, 0), counting.parent) for c in configs}
    found.add(module._cache_folder(configs[0], tokenizer, (21, 0, 0), counting.parent))
    assert len(found) == 5


def test_killed_while_the_index_is_built(
    tokenizer: Tokenizer, counting: Path, tmp_path, monkeypatch
):
    """Megatron takes an index file that is there for a complete one."""
    config = run_config(tokenizer, counting, cache_dir=tmp_path / "cache")
    build = module._build

    def killed(*args: Any, **kwargs: Any) -> None:
        build(*args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_build", killed)
    with pytest.raises(KeyboardInterrupt):
        build_datasets(config, tokenizer, (20, 0, 0))
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def test_dataset_made_anew_under_its_name_is_not_read_through_the_old_index(
    tokenizer: Tokenizer, tmp_path: Path
):
    """Megatron names a cached index after the dataset's path: the old index fitted any new data."""
    config = run_config(tokenizer, tmp_path / "x", cache_dir=tmp_path / "cache")
    for first, length in ((100, 400), (200, 40)):
        write_dataset(tmp_path / "x", [np.full(length, first)] * (4000 // length))
        train, _, _ = build_datasets(config, tokenizer, (20, 0, 0))
        assert {t for row in tokens_of(all_batches(train)) for t in row} == {first}


def test_an_index_without_a_manifest_is_not_read_into_memory_at_once(tmp_path: Path):
    """A corpus of a billion documents has an index of 20 GB."""
    with idx_path(tmp_path / "x").open("wb") as stream:
        stream.truncate(4_000_000)
    expected = hashlib.sha256(bytes(4_000_000)).hexdigest()
    tracemalloc.start()
    assert module._contents(tmp_path / "x") == expected
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 1e6


def test_whatever_rank_0_meets_reaches_every_rank():
    """As one line; the cause stays for the log of rank 0."""

    def full() -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(DataError, match=r"rank 0 met OSError: .*No space left on device") as error:
        module._on_rank_zero(full)
    assert isinstance(error.value.__cause__, OSError)
