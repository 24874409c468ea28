"""Raw text to Megatron's ``PREFIX.bin`` / ``PREFIX.idx``, with a manifest.

    inputs -> hash -> parts (tokenized by several workers) -> joined in order -> renamed at the end

The result depends on the text, its order, the tokenizer and the JSON key alone: not on workers,
parts, or how often the run was interrupted. A run that was killed continues with the parts that are
not there yet (``PREFIX.parts``); after an error the finished parts stay for the same reason, and
nothing else.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

import numpy as np
from tqdm import tqdm

from pltmoe.data.atomic import complete_file, naming
from pltmoe.data.fingerprint import fingerprint_of_files
from pltmoe.data.indexed import (
    bin_path,
    idx_path,
    index_cache,
    parts_folder,
    read_pair,
    token_dtype,
    write_index,
)
from pltmoe.data.manifest import (
    DatasetManifest,
    HashedFile,
    TokenizerRecord,
    dump_manifest,
    manifest_path,
    read_manifest,
)
from pltmoe.data.parts import (
    Fingerprint,
    Part,
    PartCounts,
    fingerprint,
    part_file,
    plan_parts,
    read_counts,
    read_lengths,
    write_part,
)
from pltmoe.data.sources import InputFile, find_inputs, reading_of
from pltmoe.data.tokenizer import Tokenizer, load_tokenizer
from pltmoe.data.workers import Workers
from pltmoe.errors import DataError
from pltmoe.runtime.files import flush_to_disk, sha256_of

log = logging.getLogger(__name__)

_SMALLEST_PART = 1 << 20
_COPY_BYTES = 8 << 20


@dataclass(frozen=True)
class PreprocessOptions:
    """How to preprocess. None of these but ``json_key`` and ``include`` changes the result."""

    json_key: str = "text"
    """Field of the text in JSONL files."""
    include: str = "*"
    """Pattern of file names to take from folders."""
    workers: int = 1
    """Processes that tokenize."""
    overwrite: bool = False
    """Replace a dataset of that name that was made from something else."""
    part_bytes: int = 32 << 20
    """Largest part, in bytes of input: what a killed run may have to do again, per worker."""
    progress: bool = True
    """Show progress bars."""


def preprocess(
    inputs: Sequence[Path],
    prefix: Path,
    tokenizer_path: Path,
    options: PreprocessOptions | None = None,
) -> DatasetManifest:
    """Tokenize files and folders into the dataset ``prefix``; return its manifest.

    An up-to-date dataset is kept as it is.

    Raises:
        DataError: no or broken input, no text at all, unusable tokenizer, a prefix that is a file's
            name, a dataset of that name made from something else, or another run at work on it.
        OSError: it cannot be written, e.g. a full disk; names the file. What is finished stays.
    """
    options = options or PreprocessOptions()
    if prefix.suffix in (".bin", ".idx"):
        short = prefix.with_suffix("")
        raise DataError(f"{prefix}: .bin and .idx are added to a prefix: give {short}")
    tokenizer = load_tokenizer(tokenizer_path)
    if not tokenizer.is_lossless:
        log.warning("%s is not lossless: decoding may not give back the same text", tokenizer_path)
    files = _without_own(find_inputs(inputs, options.include), prefix)
    with Workers(min(options.workers, _most_workers(files))) as workers:
        job = _Job(prefix, tokenizer, files, _hash_inputs(files, workers, options), options)
        if manifest := _current(job):
            log.info("%s: up to date, reused", prefix)
            return manifest
        with _parts_of(prefix) as folder:
            parts = _plan(job, folder)
            _tidy(folder, keep=parts)
            counts = _add(_tokenize(parts, workers, options))
            if not counts.documents:
                _tidy(folder, keep=[])
                raise DataError(f"{files[0].path}{' ...' * (len(files) > 1)}: no text in the input")
            joined, index, digest = _join(job, parts, folder, counts.tokens)
            manifest = _manifest(job, counts, joined, index, digest)
            _publish(prefix, joined, index, manifest)
    return manifest


@dataclass(frozen=True)
class _Job:
    """One dataset to make: where, from what, how."""

    prefix: Path
    tokenizer: Tokenizer
    files: list[InputFile]
    marks: list[Fingerprint]
    options: PreprocessOptions

    @property
    def dtype(self) -> np.dtype:
        return token_dtype(self.tokenizer.vocab_size)


def _without_own(files: list[InputFile], prefix: Path) -> list[InputFile]:
    """Leave out what earlier runs wrote, when the dataset lies in the folder of its inputs."""
    own = {bin_path(prefix).resolve(), idx_path(prefix).resolve()}
    folders = {parts_folder(prefix).resolve(), index_cache(prefix).resolve()}
    kept = [
        file
        for file in files
        if file.path.resolve() not in own and not folders & set(file.path.resolve().parents)
    ]
    if not kept:
        raise DataError(f"{prefix}: the only input is the dataset itself")
    return kept


def _most_workers(files: list[InputFile]) -> int:
    """More workers than this would wait for work."""
    total = sum(file.path.stat().st_size for file in files)
    return max(1, total // _SMALLEST_PART)


def _hash_inputs(
    files: list[InputFile], workers: Workers, options: PreprocessOptions
) -> list[Fingerprint]:
    with _bar("hashing input", sum(f.path.stat().st_size for f in files), options) as bar:
        return workers.run(fingerprint, files, bar)


def _plan(job: _Job, folder: Path) -> list[Part]:
    # Small corpora get small parts, so that several workers have something to do.
    eighth = sum(mark.bytes for mark in job.marks) // 8
    return plan_parts(
        job.files,
        job.marks,
        tokenizer=job.tokenizer,
        json_key=job.options.json_key,
        part_bytes=min(job.options.part_bytes, max(_SMALLEST_PART, eighth)),
        folder=folder,
    )


def _add(counts: list[PartCounts]) -> PartCounts:
    return PartCounts(
        documents=sum(c.documents for c in counts),
        empty_documents=sum(c.empty_documents for c in counts),
        tokens=sum(c.tokens for c in counts),
        text_bytes=sum(c.text_bytes for c in counts),
        max_token_id=max(c.max_token_id for c in counts),
    )


def _tokenize(parts: list[Part], workers: Workers, options: PreprocessOptions) -> list[PartCounts]:
    finished = {part.name: counts for part in parts if (counts := read_counts(part))}
    missing = list({part.name: part for part in parts if part.name not in finished}.values())
    if finished:
        log.info("continuing: %d of %d parts are there already", len(finished), len(parts))
    with _bar("tokenizing", sum(_size(part) for part in parts), options) as bar:
        bar.update(sum(_size(part) for part in parts if part.name in finished))
        written = workers.run(write_part, missing, bar)
    finished.update(zip((part.name for part in missing), written, strict=True))
    return [finished[part.name] for part in parts]


def _size(part: Part) -> int:
    slices = zip(part.slices, part.fingerprints, strict=True)
    return sum((piece.end or mark.bytes) - piece.begin for piece, mark in slices)


def _join(job: _Job, parts: list[Part], folder: Path, tokens: int) -> tuple[Path, Path, str]:
    """Write all parts, in order, as one .bin and .idx inside ``folder``; hash the .bin as well."""
    joined, index = folder / ".joined.bin.tmp", folder / ".joined.idx.tmp"
    digest = hashlib.sha256()
    size = tokens * job.dtype.itemsize
    with _bar("joining", size, job.options) as bar, open(joined, "wb") as target:
        for part in parts:
            with open(part_file(part, ".bin"), "rb") as source:
                while block := source.read(_COPY_BYTES):
                    target.write(block)
                    digest.update(block)
                    bar.update(len(block))
    lengths = np.concatenate([read_lengths(part) for part in parts])
    write_index(index, lengths, job.dtype)
    return joined, index, digest.hexdigest()


def _manifest(
    job: _Job, counts: PartCounts, joined: Path, index: Path, digest: str
) -> DatasetManifest:
    tokenizer = TokenizerRecord(
        path=str(job.tokenizer.model_path),
        sha256=job.tokenizer.sha256,
        vocab_size=job.tokenizer.vocab_size,
        end_of_document_id=job.tokenizer.eod,
    )
    bin_name, idx_name = bin_path(job.prefix).name, idx_path(job.prefix).name
    return DatasetManifest(
        **asdict(counts),
        dtype=job.dtype.name,
        json_key=job.options.json_key,
        tokenizer=tokenizer,
        inputs=[
            HashedFile(path=str(file.path), bytes=mark.bytes, sha256=mark.sha256)
            for file, mark in zip(job.files, job.marks, strict=True)
        ],
        bin=HashedFile(path=bin_name, bytes=joined.stat().st_size, sha256=digest),
        idx=HashedFile(path=idx_name, bytes=index.stat().st_size, sha256=sha256_of(index)),
        fingerprint=fingerprint_of_files(joined, index),
    )


def _publish(prefix: Path, joined: Path, index: Path, manifest: DatasetManifest) -> None:
    """Give the files their names. The manifest goes first and comes last: with it, all is there."""
    manifest_path(prefix).unlink(missing_ok=True)
    idx_path(prefix).unlink(missing_ok=True)
    flush_to_disk(joined)
    flush_to_disk(index)
    os.replace(joined, bin_path(prefix))
    os.replace(index, idx_path(prefix))
    with complete_file(manifest_path(prefix)) as temporary:
        temporary.write_text(dump_manifest(manifest), encoding="utf-8")
    shutil.rmtree(parts_folder(prefix))


def _current(job: _Job) -> DatasetManifest | None:
    """Return the manifest if the dataset is there and made from just this; None if it may be made.

    Raises:
        DataError: there is another or a damaged dataset of that name, and ``overwrite`` is off.
    """
    if job.options.overwrite:
        with contextlib.suppress(DataError):  # damaged: make it again
            return _matching(job)
        return None
    if manifest := _matching(job):
        return manifest
    prefix = job.prefix
    unfinished = parts_folder(prefix).is_dir() and not manifest_path(prefix).exists()
    taken = [path for path in (bin_path(prefix), idx_path(prefix)) if path.exists()]
    if taken and not unfinished:
        raise DataError(
            f"{taken[0]}: there is already a dataset of that name, made from other text or with "
            "another tokenizer; choose another prefix, or overwrite it with --overwrite"
        )
    return None


def _matching(job: _Job) -> DatasetManifest | None:
    manifest = read_manifest(job.prefix)
    if manifest is None:
        return None
    texts = [(mark.sha256, file.kind) for mark, file in zip(job.marks, job.files, strict=True)]
    recorded = [(file.sha256, reading_of(Path(file.path)).kind) for file in manifest.inputs]
    wanted = (job.options.json_key, job.tokenizer.sha256, texts)
    if wanted != (manifest.json_key, manifest.tokenizer.sha256, recorded):
        return None
    pair = read_pair(job.prefix)
    return manifest if pair.tokens == manifest.tokens else None


@contextlib.contextmanager
def _parts_of(prefix: Path) -> Iterator[Path]:
    """Hold the folder of parts for this process alone; leave only finished parts on an error."""
    folder = parts_folder(prefix)
    folder.mkdir(parents=True, exist_ok=True)
    with naming(bin_path(prefix)), open(folder / ".lock", "wb") as lock:
        _lock(lock, prefix)
        try:
            yield folder
        except BaseException:
            _tidy(folder, keep=None)
            if any(folder.glob("*.json")):
                log.info("finished parts stay in %s; the next run continues with them", folder)
            else:
                shutil.rmtree(folder)
            raise


def _lock(lock: IO[bytes], prefix: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise DataError(f"{prefix}: another run is writing this dataset; wait for it") from None


def _tidy(folder: Path, keep: list[Part] | None) -> None:
    """Remove temporary files, and parts that are incomplete or (unless None) not in ``keep``."""
    names = (
        {path.stem for path in folder.glob("*.json")}
        if keep is None
        else {part.name for part in keep}
    )
    for path in folder.iterdir():
        if path.name != ".lock" and path.name.split(".")[0] not in names:
            path.unlink()


def _bar(name: str, total: int, options: PreprocessOptions) -> tqdm:
    return tqdm(
        total=total,
        desc=name,
        unit="B",
        unit_scale=True,
        disable=not options.progress,
        mininterval=0.5 if sys.stderr.isatty() else 10.0,  # a job's log of days keeps every line
    )
