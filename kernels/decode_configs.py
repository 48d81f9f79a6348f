"""Tile sizes of the decode kernels, and into how many parts the keys of a sequence go.

Keys and values are read once and serve few rows, so that nothing but the bytes under way counts:
block_n x (stages - 1), at two programs for each multiprocessor while rows are few. The tables hold
what does that within the shared memory and without spills; none of it was timed on a GPU.
"""

from itertools import product
from typing import NamedTuple

import torch

#: Programs that keep a GPU of the family busy: two for each multiprocessor of its largest member.
PROGRAMS = {"sm_80": 216, "sm_86": 284, "sm_90": 264, "sm_100": 296, "gfx942": 608}
#: Of more new tokens a sequence, those of one head fill a tile, and the forward kernel of attention
#: takes over, most of whose steps carry no mask.
MOST_QUERIES = 64
#: A split of fewer key blocks costs more to merge than it saves; past so many, merging is the work.
LEAST_BLOCKS, MOST_SPLITS = 2, 128


class Tiles(NamedTuple):
    """A config: the rows and the keys of a tile, and the compiler's."""

    block_m: int
    block_n: int
    warps: int
    stages: int

    @property
    def options(self) -> dict[str, int]:
        """Return what the compiler is told."""
        return {"num_warps": self.warps, "num_stages": self.stages}


#: A merge: one row, and the partial results that it takes in a step.
MERGE = Tiles(1, 16, 4, 2)


#: 16-bit inputs by head dim: the most rows, which take 8 warps past 32.
_TILES = {
    16: Tiles(64, 64, 4, 5),
    32: Tiles(64, 64, 4, 5),
    64: Tiles(64, 64, 4, 4),
    128: Tiles(64, 64, 4, 3),
    256: Tiles(64, 32, 4, 3),
}
#: Entries that take the place of those above in a family.
_EXCEPTIONS: dict[str, dict[int, Tiles]] = {
    # 100 KiB of shared memory for all programs of a multiprocessor
    "sm_86": {
        32: Tiles(64, 32, 4, 5),
        64: Tiles(64, 64, 4, 3),
        128: Tiles(64, 32, 4, 3),
        256: Tiles(32, 16, 4, 3),
    },
    # more than 200 KiB, and more bandwidth to keep busy
    "sm_90": {128: Tiles(64, 64, 4, 4), 256: Tiles(64, 32, 4, 4)},
    "sm_100": {
        64: Tiles(64, 128, 4, 3),
        128: Tiles(64, 32, 4, 5),
        256: Tiles(64, 32, 4, 4),
    },
    # 64 KiB
    "gfx942": {
        64: Tiles(64, 32, 4, 3),
        128: Tiles(64, 32, 4, 2),
        256: Tiles(32, 16, 4, 2),
    },
}
# Single precision has no tensor cores: small tiles, the same for every family.
_SINGLE = {
    16: Tiles(16, 32, 4, 3),
    32: Tiles(16, 32, 4, 3),
    64: Tiles(16, 32, 8, 2),
    128: Tiles(16, 32, 8, 2),
    256: Tiles(16, 16, 8, 2),
}


def decode_tiles(family: str, block_d: int, dtype: torch.dtype, rows: int, paged: bool) -> Tiles:
    """Return the config of a call with so many `rows` for each key head."""
    tiles = _EXCEPTIONS.get(family, {}).get(block_d) or _TILES[block_d]
    if dtype == torch.float32:
        tiles = _SINGLE[block_d]
    block_m = 16
    while block_m < min(rows, tiles.block_m):
        block_m *= 2
    # The compiler spreads the stages over the loads of pages' numbers and those of their keys.
    stages = 2 * tiles.stages - 1 if paged else tiles.stages
    return Tiles(block_m, tiles.block_n, 8 if block_m > 32 else tiles.warps, stages)


def candidates(tiles: Tiles) -> list[Tiles]:
    """Return what a search tries besides the table's `tiles`: with the same rows."""
    grid = product((tiles.block_m,), (16, 32, 64, 128), (4, 8), (2, 3, 4, 5, 6, 8))
    return [Tiles(*each) for each in grid]


def choose_splits(programs: int, keys: int, block_n: int, family: str) -> int:
    """Return into how many parts `keys` keys go, where one part makes `programs` programs.

    By shapes alone: lengths lie on the device, and waiting for them would cost more than any split.
    """
    most = min(-(-keys // block_n) // LEAST_BLOCKS, MOST_SPLITS)
    return max(1, min(PROGRAMS[family] // max(programs, 1), most))
