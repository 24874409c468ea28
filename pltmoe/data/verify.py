"""Checks made once before training starts: do data, tokenizer and model fit each other?

With a manifest they cost milliseconds. A dataset without one (Megatron-LM's own, say) is read
through once for its largest token id; the result is kept in the cache folder.
"""

import json
import logging
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from pltmoe.config.run import DataConfig, RunConfig
from pltmoe.data.atomic import complete_file
from pltmoe.data.fingerprint import fingerprint
from pltmoe.data.indexed import IndexedPair, bin_path, idx_path, read_pair
from pltmoe.data.manifest import DatasetManifest, manifest_path, read_manifest
from pltmoe.data.tokenizer import Tokenizer
from pltmoe.errors import DataError

log = logging.getLogger(__name__)

SPLITS = ("train", "valid", "test")


def verify_vocabulary(config: RunConfig, tokenizer: Tokenizer) -> None:
    """Check that the model has a row for every piece.

    Raises:
        DataError: it has not.
    """
    if tokenizer.vocab_size > config.model.vocab_size:
        raise DataError(
            f"model.vocab_size ({config.model.vocab_size}) is smaller than the vocabulary "
            f"({tokenizer.vocab_size}) of data.tokenizer {tokenizer.model_path}: "
            "raise model.vocab_size"
        )


def verify_dataset(
    prefix: Path, data: DataConfig, tokenizer: Tokenizer, cache: Path
) -> IndexedPair:
    """Check one dataset: whole files, same tokenizer, ids within the vocabulary.

    Raises:
        DataError: what does not fit, with the file.
    """
    pair = read_pair(prefix)
    manifest = read_manifest(prefix)
    if manifest is None:
        log.info("%s: no manifest; looking for the largest token id in the .bin", prefix)
        _check_ids(prefix, _scanned_largest_id(pair, cache), tokenizer)
        _check_document_ends(pair, data, tokenizer)
        return pair
    _check_manifest(pair, manifest, tokenizer)
    _check_ids(prefix, manifest.max_token_id, tokenizer)
    return pair


def verify_split(
    pair: IndexedPair, share: tuple[float, float, float], samples: Sequence[int], sequence: int
) -> None:
    """Check that every part of a split that is asked for has text.

    Megatron would look for samples in an empty part for ever.

    Raises:
        DataError: a part has no documents.
    """
    borders = np.cumsum([0.0, *share]) / sum(share)
    edges = [int(round(border * len(pair.lengths))) for border in borders]
    for name, begin, end, wanted in zip(SPLITS, edges, edges[1:], samples, strict=False):
        tokens = int(pair.lengths[begin:end].sum(dtype=np.int64))
        if wanted and not tokens:
            raise DataError(
                f"data.split {list(share)} leaves none of the {len(pair.lengths)} documents of "
                f"{pair.prefix} for '{name}': give it a larger share or more documents"
            )
        if wanted and tokens <= sequence:
            log.warning(
                "%s has %d tokens for '%s', less than one sequence (%d): its text is repeated",
                pair.prefix, tokens, name, sequence,
            )  # fmt: skip


def _check_manifest(pair: IndexedPair, manifest: DatasetManifest, tokenizer: Tokenizer) -> None:
    where = manifest_path(pair.prefix)
    if manifest.tokenizer.vocab_size != tokenizer.vocab_size:
        raise DataError(
            f"{where}: made with a vocabulary of {manifest.tokenizer.vocab_size} pieces, but "
            f"data.tokenizer {tokenizer.model_path} has {tokenizer.vocab_size}: "
            "use the tokenizer of the dataset, or preprocess it again"
        )
    if manifest.tokenizer.sha256 != tokenizer.sha256:
        raise DataError(
            f"{where}: made with another tokenizer of the same size ({manifest.tokenizer.path}) "
            f"than data.tokenizer {tokenizer.model_path}: their ids mean different text; "
            "use the tokenizer of the dataset, or preprocess it again"
        )
    if manifest.tokenizer.end_of_document_id != tokenizer.eod:
        raise DataError(
            f"{where}: its documents end with id {manifest.tokenizer.end_of_document_id}, those of "
            f"data.tokenizer {tokenizer.model_path} with {tokenizer.eod}: name the same eos_token "
            "in its tokenizer_config.json, or preprocess it again"
        )
    sizes = {bin_path(pair.prefix): manifest.bin.bytes, idx_path(pair.prefix): manifest.idx.bytes}
    for path, size in sizes.items():
        if path.stat().st_size != size:
            raise DataError(
                f"{path}: {path.stat().st_size} bytes, but {where.name} recorded {size}; "
                "it belongs to another run: preprocess it again"
            )
    if manifest.fingerprint not in (None, fingerprint(pair.prefix)):
        raise DataError(
            f"{bin_path(pair.prefix)}: it and its .idx are not the files that {where.name} was "
            "written for: one was replaced or is damaged; preprocess it again"
        )


def _check_ids(prefix: Path, largest: int, tokenizer: Tokenizer) -> None:
    if not 0 <= largest < tokenizer.vocab_size:
        raise DataError(
            f"{bin_path(prefix)}: holds token id {largest}, but data.tokenizer "
            f"{tokenizer.model_path} has ids 0 .. {tokenizer.vocab_size - 1}: "
            "it was made with another tokenizer"
        )


def _check_document_ends(pair: IndexedPair, data: DataConfig, tokenizer: Tokenizer) -> None:
    if tokenizer.eod in (last := pair.last_ids()) or not len(last):
        return
    found = (
        f"{bin_path(pair.prefix)}: no document ends with id {tokenizer.eod}, as those of "
        f"data.tokenizer {tokenizer.model_path} do: it was made with another tokenizer, or by "
        "Megatron-LM's preprocess_data.py without --append-eod"
    )
    for field in ("reset_position_ids", "mask_document_ends"):
        if getattr(data, field):
            raise DataError(
                f"{found}; data.{field} would do nothing: make the dataset anew, or set it to false"
            )
    log.warning("%s; what is trained on it does not learn where a text ends", found)


def _scanned_largest_id(pair: IndexedPair, cache: Path) -> int:
    """Read the .bin once, and remember the result for the file as it is now."""
    path = bin_path(pair.prefix)
    state = [str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns]
    record = cache / f"{pair.prefix.name}.largest_id.json"
    with suppress(OSError, ValueError, KeyError, TypeError):
        known = json.loads(record.read_text(encoding="utf-8"))
        if known["file"] == state:
            return int(known["largest_id"])
    largest = pair.largest_id()
    with complete_file(record) as temporary:
        temporary.write_text(json.dumps({"file": state, "largest_id": largest}), encoding="utf-8")
    return largest
