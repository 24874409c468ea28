"""Tile sizes of the expert kernels, by how many rows an expert gets. Pure arithmetic.

A decode step is bound by reading weights, so a tile has to keep enough bytes on the way: two or
three programs per processor with three or four stages of 16 to 32 KiB each.
"""

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Tile:
    """Columns and inner elements of one tile of weights, and how a program runs."""

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int

    def arguments(self) -> dict[str, int]:
        """Return what a launch takes."""
        names = {"block_n": "BLOCK_N", "block_k": "BLOCK_K"}
        return {names.get(name, name): value for name, value in asdict(self).items()}


@dataclass(frozen=True)
class Tiles:
    """Rows of a block, and the tiles of both products."""

    block_m: int
    gate_up: Tile
    down: Tile


# Candidates that the benchmark's sweep times on a device; the first is the default.
GATE_UP = (
    Tile(32, 128, 4, 4), Tile(16, 256, 4, 4), Tile(32, 256, 4, 3), Tile(64, 64, 4, 4),
    Tile(64, 128, 8, 3), Tile(128, 64, 8, 4),
)  # fmt: skip
DOWN = (
    Tile(64, 128, 4, 4), Tile(32, 128, 4, 4), Tile(32, 256, 4, 4), Tile(64, 256, 4, 3),
    Tile(128, 64, 8, 4), Tile(128, 128, 8, 3),
)  # fmt: skip
_CHOSEN: dict[tuple[int, int], Tiles] = {}


def choose_tiles(rows: int, experts: int) -> Tiles:
    """Return the tiles for ``rows`` routed rows over ``experts`` experts of a layer."""
    block_m = rows_per_block(rows, experts)
    return _CHOSEN.get((block_m, experts), Tiles(block_m, GATE_UP[0], DOWN[0]))


def use_tiles(tiles: Tiles, experts: int) -> None:
    """Use these from now on for as many rows per block and experts (found by a sweep)."""
    _CHOSEN[tiles.block_m, experts] = tiles


def rows_per_block(rows: int, experts: int) -> int:
    """Return 16, 32 or 64: an expert with twice the mean number of rows still fits one block."""
    for block in (16, 32):
        if 2 * rows <= block * experts:
            return block
    return 16 if rows <= 16 else 64
