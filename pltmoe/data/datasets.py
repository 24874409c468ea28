"""Training, validation and test data: Megatron's blended GPT datasets, checked before they start.

    DataSource -> IndexedDataset (.bin/.idx) -> GPTDataset (cut into sequences, shuffled)
               -> BlendedDataset (mixed by weight) -> batches() (micro batches of one rank)

The order of the sequences is fixed by (sources, weights, split, sequence length, seed, number of
samples). Where a run stands in it is one number, the consumed samples; every data-parallel size
sees the same sequences in the same step. Asking for another number of samples (``train.steps``)
shuffles anew when the text has to be repeated, as Megatron shuffles all epochs but the last.
"""

import hashlib
import json
import logging
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from torch.utils.data import DataLoader, Dataset

from pltmoe.config.run import DataConfig, DataSource, RunConfig
from pltmoe.data.indexed import idx_path, index_cache, read_pair
from pltmoe.data.manifest import read_manifest
from pltmoe.data.tokenizer import Tokenizer
from pltmoe.data.verify import SPLITS, verify_dataset, verify_split, verify_vocabulary
from pltmoe.errors import DataError
from pltmoe.runtime.files import sha256_of

log = logging.getLogger(__name__)

Samples = tuple[int, int, int]
"""Sequences wanted for training, validation and test."""
Datasets = tuple[Dataset[Any] | None, Dataset[Any] | None, Dataset[Any] | None]

_KEYS = ("tokens", "labels", "loss_mask", "position_ids")


def build_datasets(config: RunConfig, tokenizer: Tokenizer, num_samples: Samples) -> Datasets:
    """Check the data and build the train, valid and test sets, None where no sample is asked for.

    Collective when torch.distributed is initialised. Rank 0 checks and builds the index cache, once
    for all ranks and later runs; every rank raises the same error. The cache appears under its name
    only when it is complete.

    Raises:
        DataError: missing, half-written or mismatched data; an empty part of the split; samples
            asked of a set without a source, or too few for so many sources; a cache folder that
            cannot be used.
    """
    root = config.data.cache_dir or index_cache(config.data.train[0].path)
    _on_rank_zero(lambda: _verify(config, tokenizer, num_samples, root))
    cache = Path(_on_rank_zero(lambda: str(_cache_folder(config, tokenizer, num_samples, root))))
    _on_rank_zero(lambda: _build_cache(config, tokenizer, num_samples, cache))
    if not cache.is_dir():  # rank 0 has it
        raise DataError(
            f"{cache}: not visible to every process; put data.cache_dir on a file system that all "
            "machines share"
        )
    train, valid, test = _build(config, tokenizer, num_samples, cache)
    return train, valid, test


def batches(
    dataset: Dataset[Any],
    *,
    consumed_samples: int,
    micro_batch_size: int,
    dp_rank: int,
    dp_size: int,
    num_workers: int = 0,
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield this rank's micro batches, beginning after ``consumed_samples`` (over all ranks).

    Each has ``tokens``, ``labels``, ``position_ids`` ``[b, s]`` int64 and ``loss_mask`` ``[b, s]``
    float32. The k-th micro batches of all ranks together are the next ``b * dp_size`` sequences, so
    a global batch holds the same sequences for every ``dp_size``. Ends when the dataset has no
    complete row of micro batches left. Draws nothing from the global random state, so that a
    resumed run and one that never stopped stay equal.
    """
    loader = DataLoader(
        dataset,
        batch_sampler=_MicroBatches(
            len(dataset),  # type: ignore[arg-type]
            consumed_samples,
            micro_batch_size,
            dp_rank,
            dp_size,
        ),
        num_workers=num_workers,
        worker_init_fn=_leave_signals_to_the_trainer,
        collate_fn=_stack,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),
    )
    return iter(loader)


def _leave_signals_to_the_trainer(worker: int) -> None:
    """Live on through a scheduler's signals: it sends them to every process of a job.

    The trainer then saves, for which it must not lose its loaders; it ends them itself, with
    SIGTERM too, so they look at who sends it.
    """
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_when_told_by, args=(os.getppid(),), daemon=True).start()


def _end_when_told_by(trainer: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != trainer:
        continue
    os._exit(0)


class _MicroBatches:
    """Indices of one rank's micro batches; a pure function of its arguments."""

    def __init__(self, total: int, consumed: int, size: int, dp_rank: int, dp_size: int):
        assert consumed >= 0 and size > 0 and 0 <= dp_rank < dp_size
        self._starts = range(consumed + dp_rank * size, total, size * dp_size)
        self._rows = max(0, total - consumed) // (size * dp_size)
        self._size = size

    def __len__(self) -> int:
        return self._rows

    def __iter__(self) -> Iterator[list[int]]:
        for start in self._starts[: self._rows]:
            yield list(range(start, start + self._size))


def _stack(samples: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {key: torch.stack([sample[key] for sample in samples]) for key in _KEYS}


def _sources(data: DataConfig, num_samples: Samples) -> list[list[DataSource]]:
    """Sources of train, valid and test; empty where no sample is asked for."""
    cut = data.split is not None
    valid, test = (data.train if cut else data.valid), (data.train if cut else [])
    return [
        sources if wanted else []
        for sources, wanted in zip((data.train, valid, test), num_samples, strict=True)
    ]


def _verify(config: RunConfig, tokenizer: Tokenizer, num_samples: Samples, root: Path) -> None:
    data = config.data
    verify_vocabulary(config, tokenizer)
    per_split = _sources(data, num_samples)
    for name, share, sources, wanted in zip(
        SPLITS, data.split or (1, 1, 1), per_split, num_samples, strict=True
    ):
        if wanted and not (sources and share):
            raise DataError(
                f"{wanted} sequences for '{name}' are wanted, but nothing says where they come "
                f"from: give data.split a share for it{' or set data.valid' * (name == 'valid')}"
            )
    paths = {source.path: None for sources in per_split for source in sources}
    for path in paths:  # before the cache folder is made, which may be beside a mistyped path
        read_pair(path)
    _check_writable(root)
    for path in paths:
        pair = verify_dataset(path, data, tokenizer, root)
        if data.split:
            verify_split(pair, data.split, num_samples, data.sequence_length)
        else:
            verify_split(pair, (1, 0, 0), (1, 0, 0), data.sequence_length)


def _check_writable(root: Path) -> None:
    probe = root / f".writable.{os.getpid()}.tmp"
    try:
        root.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise DataError(
            f"{root}: the index cache cannot be written there ({error.strerror}): "
            "set data.cache_dir to a folder that can be written"
        ) from None


def _cache_folder(
    config: RunConfig, tokenizer: Tokenizer, num_samples: Samples, root: Path
) -> Path:
    """Name the cache after everything that decides it, contents included.

    Megatron's own name for a cached index has the path of the dataset but not its contents: a
    dataset made anew under the same name would be read through the index of the old one.
    """
    parts = _sources(config.data, num_samples)
    contents = {path: _contents(path) for path in {s.path for part in parts for s in part}}
    sources = [[(str(s.path), s.weight, contents[s.path]) for s in part] for part in parts]
    data = config.data
    decides = (sources, data.split, data.sequence_length, num_samples, config.train.seed)
    text = json.dumps([*decides, tokenizer.sha256])
    return root / hashlib.sha256(text.encode()).hexdigest()[:24]


def _contents(prefix: Path) -> str:
    if manifest := read_manifest(prefix):
        return manifest.idx.sha256
    return sha256_of(idx_path(prefix))


def _build_cache(
    config: RunConfig, tokenizer: Tokenizer, num_samples: Samples, cache: Path
) -> None:
    """Build the index under a temporary name and rename it when it is complete."""
    if cache.is_dir():
        return
    temporary = cache.with_name(f".{cache.name}.{os.getpid()}.tmp")
    try:
        _build(config, tokenizer, num_samples, temporary)
        _rename_folder(temporary, cache)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _rename_folder(temporary: Path, final: Path) -> None:
    try:
        os.replace(temporary, final)
    except OSError:
        if not final.is_dir():
            raise
        log.info("%s: built by another run in the meantime", final)


class _Builder(BlendedMegatronDatasetBuilder):
    """Waits for no other rank: an error of one would leave them at Megatron's barriers."""

    @staticmethod
    def build_generic_dataset(cls: Any, is_built: Any, synchronize: bool, *args: Any) -> Any:
        return cls(*args)

    def _build_megatron_datasets_parallel(
        self, prefixes: list[str], split: list[Any], sizes: list[list[int]]
    ) -> list[Any]:
        each = zip(prefixes, sizes, strict=True)
        built = [self._build_megatron_dataset_splits(path, split, size) for path, size in each]
        return list(zip(*built, strict=True))


def _build(
    config: RunConfig, tokenizer: Tokenizer, num_samples: Samples, cache: Path
) -> Sequence[Any]:
    dataset_config = _dataset_config(config, tokenizer, num_samples, cache)
    builder = _Builder(GPTDataset, list(num_samples), lambda: True, dataset_config)
    try:
        return builder.build()
    except IndexError as error:
        if "oversamples" not in str(error):
            raise
        name = next(name for name in SPLITS if f"The {name} blend" in str(error))
        raise DataError(
            f"data: too many sources for the {num_samples[SPLITS.index(name)]} sequences of "
            f"'{name}' (Megatron rounds the share of each up, and one that is repeated ran out): "
            f"give '{name}' fewer sources, or 200 sequences and more for each"
        ) from error


def _dataset_config(
    config: RunConfig, tokenizer: Tokenizer, num_samples: Samples, cache: Path
) -> GPTDatasetConfig:
    data = config.data
    blends = [_blend(sources) for sources in _sources(data, num_samples)]
    where = (
        {"blend": _blend(data.train), "split": ",".join(str(share) for share in data.split)}
        if data.split
        else {"blend_per_split": blends}
    )
    result = GPTDatasetConfig(
        **where,
        random_seed=config.train.seed,
        sequence_length=data.sequence_length,
        path_to_cache=str(cache),
        tokenizer=tokenizer,  # type: ignore[arg-type]  # only its ids and identifiers are used
        reset_position_ids=data.reset_position_ids,
        reset_attention_mask=False,
        eod_mask_loss=data.mask_document_ends,
        create_attention_mask=False,  # no s x s mask: causality is the kernel's
    )
    if result.split_matrix is not None:
        # Megatron would search for ever in a part without documents, even for no samples.
        result.split_matrix = [
            share if wanted else None
            for share, wanted in zip(result.split_matrix, num_samples, strict=True)
        ]
    return result


def _blend(sources: Sequence[DataSource]) -> tuple[list[str], list[float] | None] | None:
    """Return a blend as Megatron wants it; weights only where there is something to weigh."""
    if not sources:
        return None
    weights = [source.weight for source in sources] if len(sources) > 1 else None
    return [str(source.path) for source in sources], weights


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def _on_rank_zero[T](function: Callable[[], T]) -> T:
    """Call ``function`` on rank 0 only; every rank gets its result, or its error as DataError."""
    answer: list[Any] = [None, None]
    cause: Exception | None = None
    if _rank() == 0:
        try:
            answer[0] = function()
        except DataError as error:
            answer[1] = str(error)
        except Exception as error:  # a full disk, say: the others must not wait for what comes next
            answer[1], cause = f"rank 0 met {type(error).__name__}: {error}", error
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise DataError(answer[1]) from cause
    return answer[0]
