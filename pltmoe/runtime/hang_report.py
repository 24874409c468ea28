"""Who is behind? Turns what every rank says of itself into a few lines that name the culprit."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Sighting:
    """What is known of one rank."""

    mark: int
    """Marks passed. All ranks pass the same ones in the same order, so the lowest is behind."""
    doing: str
    """Name of the last mark, e.g. ``data of step 7``."""
    seconds: float
    """Since then."""
    place: str = ""
    """Where the main thread is: ``file.py:12 function``."""
    waits: bool = False
    """Whether the main thread is inside torch.distributed, waiting for others."""
    answers: bool = True
    """Whether this is from now, or the last that was heard of a rank that is silent."""


def report(ranks: Sequence[Sighting | None]) -> tuple[str, list[int]]:
    """Name the ranks that are behind, then say where all are; None: never heard of.

    Returns:
        The text, and the ranks that are behind (none where nothing tells them from the others).
    """
    behind, why = _behind(ranks)
    lines = [f"no progress: {why}"]
    groups: dict[str, list[int]] = {}
    for rank, sighting in enumerate(ranks):
        groups.setdefault(_describe(sighting), []).append(rank)
    lines += [f"  {_ranks(members)}: {text}" for text, members in groups.items()]
    return "\n".join(lines), behind


def _behind(ranks: Sequence[Sighting | None]) -> tuple[list[int], str]:
    silent = [rank for rank, seen in enumerate(ranks) if seen is None or not seen.answers]
    if silent:
        return silent, (
            f"{_ranks(silent)} did not answer: stopped, dead, cut off, or inside C code that "
            "holds Python's lock"
        )
    seen = [sighting for sighting in ranks if sighting is not None]
    last = min(sighting.mark for sighting in seen)
    behind = [rank for rank, sighting in enumerate(seen) if sighting.mark == last]
    if len(behind) < len(seen):
        return behind, f"{_ranks(behind)} behind the others"
    idle = [rank for rank, sighting in enumerate(seen) if not sighting.waits]
    if 0 < len(idle) < len(seen):
        return idle, f"all but {_ranks(idle)} wait in torch.distributed"
    return [], "all ranks are at the same place, see their stacks"


def _describe(sighting: Sighting | None) -> str:
    if sighting is None:
        return "never heard of"
    if not sighting.answers:
        return f"last heard of in: {sighting.doing}"
    where = f", at {sighting.place}" if sighting.place else ""
    waiting = ", waiting for other ranks" if sighting.waits else ""
    return f"{sighting.doing}{where}{waiting}"


def _ranks(ranks: Sequence[int]) -> str:
    """Return ``rank 3`` or ``ranks 0-2, 5`` for ascending numbers."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and runs[-1][1] == rank - 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    pieces = [f"{first}" if first == last else f"{first}-{last}" for first, last in runs]
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(pieces)
