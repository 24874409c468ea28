"""Checksums of checkpoint files: taken when they are written, compared before they are loaded.

XXH3 (128 bits) is for accidents, not for attackers. It is as fast as memory, so that a check costs
one reading of the files; SHA-256 takes ten times as long as a disk on processors without
instructions for it. Every rank reads its share of the files, each with a few threads.
"""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch.distributed as dist
import xxhash
from tqdm import tqdm

from pltmoe.checkpoint.manifest import Manifest
from pltmoe.errors import DamagedCheckpointError

_BLOCK_BYTES = 1 << 20
"""Of a thread of its own at each save: malloc keeps it in several arenas, so it is small."""
_THREADS = 4
_WORTH_A_BAR_BYTES = 4 << 30


def checksum(path: Path, bar: tqdm | None = None) -> str:
    """Return ``xxh3_128:`` and the checksum of a file in hexadecimal digits."""
    state, block = xxhash.xxh3_128(), memoryview(bytearray(_BLOCK_BYTES))
    with path.open("rb", buffering=0) as stream:
        while size := stream.readinto(block):
            state.update(block[:size])
            if bar is not None:
                bar.update(size)
    return f"xxh3_128:{state.hexdigest()}"


def checksums(folder: Path, files: Iterable[Path]) -> dict[str, str]:
    """Return the checksums of ``files`` by their names within ``folder``."""
    return {path.relative_to(folder).as_posix(): checksum(path) for path in files}


def check_files(folder: Path, manifest: Manifest) -> None:
    """Compare all files of a checkpoint with their checksums, in this process alone.

    Raises:
        DamagedCheckpointError: a file has changed since it was written, or cannot be read.
    """
    _refuse(folder, _changed(folder, manifest, list(manifest.checksums)))


def check_files_together(folder: Path, manifest: Manifest) -> None:
    """Compare a checkpoint with its checksums, a share of the files on each rank; all call it.

    Raises:
        DamagedCheckpointError: see ``check_files``; the same on every rank.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    largest_first = sorted(manifest.checksums, key=lambda name: (-manifest.files[name], name))
    found = _changed(folder, manifest, largest_first[rank::world], show=rank == 0)
    if world > 1:
        everyone: list[list[str]] = [[]] * world
        dist.all_gather_object(everyone, found)
        found = [reason for reasons in everyone for reason in reasons]
    _refuse(folder, found)


def _changed(
    folder: Path, manifest: Manifest, names: Sequence[str], show: bool = True
) -> list[str]:
    """Return a reason for every file that is not what was written."""
    total = sum(manifest.files[name] for name in names)
    quiet = not show or total < _WORTH_A_BAR_BYTES
    with tqdm(
        total=total, unit="B", unit_scale=True, desc=f"checking {folder.name}", disable=quiet
    ) as bar:

        def reason(name: str) -> str | None:
            try:
                found = checksum(folder / name, bar)
            except OSError as error:
                return f"{name} cannot be read ({error.strerror or error})"
            written = manifest.checksums[name]
            return None if found == written else f"{name} has changed since it was written"

        with ThreadPoolExecutor(_THREADS) as threads:
            return [found for found in threads.map(reason, names) if found]


def _refuse(folder: Path, reasons: list[str]) -> None:
    if reasons:
        more = f" (and {len(reasons) - 3} more)" if len(reasons) > 3 else ""
        raise DamagedCheckpointError(
            f"{folder}: {'; '.join(reasons[:3])}{more}: the checkpoint is damaged; resume from "
            "another one"
        )
