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

    def arguments(self, element_bytes: int = 2) -> dict[str, int]:
        """Return what a launch takes; half of the stages for elements of 4 bytes."""
        names = {"block_n": "BLOCK_N", "block_k": "BLOCK_K"}
        found = {names.get(name, name): value for name, value in asdict(self).items()}
        return found | {"num_stages": self.num_stages * 2 // max(2, element_bytes)}


@dataclass(frozen=True)
class Tiles:
    """Rows of a block, and the tiles of both products."""

    block_m: int
    gate_up: Tile
    down: Tile


# Chosen from the sizes of shared memory and registers, and the instructions, that the compiler
# reports for an H200; not tuned by measurements yet. With 16 rows the whole lines of 256 bytes of
# a weight's row come in one tile. From 32 rows on there are more columns: with 32 rows x 32 columns
# every warp reads (and widens) every weight of the tile for itself, and with 64 rows a processor
# has room for one program.
FEW_ROWS = Tile(32, 128, 4, 4), Tile(64, 128, 4, 4)
MANY_ROWS = Tile(64, 64, 4, 4), Tile(128, 64, 4, 4)


def choose_tiles(rows: int, experts: int) -> Tiles:
    """Return the tiles for ``rows`` routed rows over ``experts`` experts of a layer."""
    block_m = rows_per_block(rows, experts)
    return Tiles(block_m, *(FEW_ROWS if block_m == 16 else MANY_ROWS))


def rows_per_block(rows: int, experts: int) -> int:
    """Return 16, 32 or 64: an expert with twice the mean number of rows still fits one block."""
    for block in (16, 32):
        if 2 * rows <= block * experts:
            return block
    return 16 if rows <= 16 else 64
