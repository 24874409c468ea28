"""One checkpoint on its way to disk: planned together, written alone, completed together.

    begin   all ranks: who writes what; a copy in host memory         training waits
    write   each rank for itself, in a thread: tensors, checksums     training goes on
    finish  all ranks: index, manifest, ``latest``, rename            training waits

The thread calls no collective. What could fail on one rank alone is told to rank 0 before anything
is completed, and every rank raises the same error.
"""

import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint.api import CheckpointException

from pltmoe.checkpoint.folders import OLD, WRITING, point_to
from pltmoe.checkpoint.in_process import ShardWriter
from pltmoe.checkpoint.integrity import checksums
from pltmoe.checkpoint.manifest import Manifest, write_manifest
from pltmoe.errors import CheckpointError
from pltmoe.runtime.distributed import highest, on_main
from pltmoe.runtime.files import flush_to_disk, sha256_of

_PATIENCE_S = 30.0


class Save:
    """A checkpoint folder in the making; every method but ``abandon`` is called by all ranks.

    Args:
        final: the folder; it appears when it is whole.
        state: sharded state dict of this rank.
        manifest: what to say about it; sizes, checksums and the tokenizer's hash are filled in.
        tokenizer: what ``read_tokenizer`` returns, on rank 0; written into the folder.
        background: return at once, with a copy of ``state`` in host memory; else write now.
        point: let ``latest`` beside the folder name it at the end.

    Raises:
        CheckpointError: the folder cannot be made.
    """

    def __init__(
        self,
        final: Path,
        state: dict[str, Any],
        manifest: Manifest,
        tokenizer: Mapping[str, bytes] | None = None,
        *,
        background: bool = False,
        point: bool = True,
    ):
        self.final, self._manifest, self._tokenizer, self._point = final, manifest, tokenizer, point
        self._writing = final.with_name(WRITING + final.name)
        self._results: list[Any] = []
        self._checksums: dict[str, str] = {}
        self._problem: str | None = None
        on_main(lambda: _explain(self._writing, lambda: _fresh_folder(self._writing)))
        try:
            self._shards = ShardWriter(self._writing, state, copy=background)
        except (CheckpointException, CheckpointingException, OSError, RuntimeError) as error:
            raise CheckpointError(
                f"{self._writing}: cannot be written ({reason(error)})"
            ) from error
        self._thread: threading.Thread | None = None
        if background:
            self._thread = threading.Thread(target=self._write, name=f"save {final.name}")
            self._thread.start()
        else:
            self._write()

    def is_written(self) -> bool:
        """Whether every rank has written its files, so that ``finish`` need not wait."""
        return highest(float(self._thread is not None and self._thread.is_alive())) == 0

    def finish(self) -> Path:
        """Wait for the files of all ranks, make the folder whole and return it.

        Raises:
            CheckpointError: it cannot be written (disk full, no permission); nothing of it is left,
                and older ones are untouched.
        """
        if self._thread is not None:
            self._thread.join()
        mine = (self._problem, self._results, self._checksums)
        reports: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(mine, reports)
        on_main(lambda: self._complete(reports or []))
        return self.final

    def abandon(self) -> None:
        """Stop this rank's writing; the next start of the run deletes what is there."""
        self._shards.abandon()

    def _write(self) -> None:
        """Write and read again this rank's files; a thread's error waits for ``finish``."""
        try:
            self._results = self._shards.write()
            self._checksums = checksums(self._writing, self._shards.files)
        except Exception as error:  # told to all ranks, and raised there
            self._problem = reason(error)

    def _complete(self, reports: list[tuple[str | None, list[Any], dict[str, str]]]) -> None:
        """Make the folder whole, on rank 0."""
        problems = [f"rank {r}: {report[0]}" for r, report in enumerate(reports) if report[0]]
        if problems:
            shutil.rmtree(self._writing, ignore_errors=True)
            more = f" and {len(problems) - 2} more ranks" if len(problems) > 2 else ""
            raise _cannot_be_written(self.final, "; ".join(problems[:2]) + more)
        try:
            _explain(self.final, lambda: self._complete_folder(reports))
        except CheckpointError:
            shutil.rmtree(self._writing, ignore_errors=True)
            raise

    def _complete_folder(self, reports: list[tuple[str | None, list[Any], dict[str, str]]]) -> None:
        writing, more = self._writing, {}
        self._see_all([sums for _, _, sums in reports])
        self._shards.complete([results for _, results, _ in reports])
        if self._tokenizer is not None:
            for name, contents in self._tokenizer.items():
                (writing / name).write_bytes(contents)
            main = next(iter(self._tokenizer))
            more["tokenizer_sha256"] = sha256_of(writing / main)
        known = {name: value for _, _, sums in reports for name, value in sums.items()}
        written = {p.relative_to(writing).as_posix(): p for p in writing.rglob("*") if p.is_file()}
        rest = [path for name, path in sorted(written.items()) if name not in known]
        more["checksums"] = known | checksums(writing, rest)
        write_manifest(writing, self._manifest.model_copy(update=more))
        _put_on_disk(writing)
        if self._point:  # first: a crash before the rename leaves a name that is not there yet,
            point_to(self.final)  # one after it would leave a newer folder than ``latest`` names
        _appear(writing, self.final)

    def _see_all(self, files_of_ranks: list[dict[str, str]]) -> None:
        """Look for every rank's files, on rank 0; a network file system may show them late."""
        patience = time.monotonic() + _PATIENCE_S
        for rank, files in enumerate(files_of_ranks):
            for name in files:
                while not (self._writing / name).is_file():
                    if time.monotonic() > patience:
                        raise _cannot_be_written(
                            self.final,
                            f"rank {rank} wrote {name}, which rank 0 does not see: "
                            "train.output_dir must lie on a file system that all machines share",
                        )
                    time.sleep(0.1)


def reason(error: BaseException) -> str:
    """Return the line of an error that says most.

    On a full disk PyTorch's writer ends with "unexpected pos"; what the system said came before.
    """
    before: BaseException | None = error
    while before is not None:
        if isinstance(before, OSError) and before.errno:
            return os.strerror(before.errno)
        before = before.__cause__ or before.__context__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _fresh_folder(writing: Path) -> None:
    if writing.exists():
        shutil.rmtree(writing)
    writing.mkdir(parents=True)


def _put_on_disk(writing: Path) -> None:
    """Put everything in ``writing`` on disk for good."""
    for path in writing.rglob("*"):
        if path.is_file():
            flush_to_disk(path)
    flush_to_disk(writing)


def _appear(writing: Path, final: Path) -> None:
    """Give ``writing`` its name."""
    if final.exists():  # the same step again, after a resume from an older one
        os.rename(final, final.with_name(OLD + final.name))
    os.rename(writing, final)
    flush_to_disk(final.parent)
    shutil.rmtree(final.with_name(OLD + final.name), ignore_errors=True)


def _explain(path: Path, action: Callable[[], Any]) -> None:
    try:
        action()
    except (OSError, RuntimeError) as error:
        raise _cannot_be_written(path, reason(error)) from error


def _cannot_be_written(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{path}: cannot be written ({why}); older checkpoints are untouched")
