"""Tile sizes of the attention kernels, by pass, architecture family, head dim and dropout."""

from typing import NamedTuple

import torch


class Tiles(NamedTuple):
    """A config: the tile of a program, the part of it that a masked step takes, and the compiler's.

    `edge` divides the side that a program walks along (BLOCK_N, in the dk/dv pass BLOCK_M): masks
    need registers, and smaller steps at the diagonal waste less.
    """

    block_m: int
    block_n: int
    edge: int
    warps: int
    stages: int


_FORWARD = {
    "sm_80": {
        16: Tiles(128, 64, 64, 4, 3),
        32: Tiles(128, 64, 64, 4, 3),
        64: Tiles(128, 128, 64, 8, 2),
        128: Tiles(128, 64, 32, 8, 2),
        256: Tiles(64, 32, 32, 4, 2),
    },
}
_KEY_GRADIENT = {
    "sm_80": {
        16: Tiles(64, 128, 32, 4, 2),
        32: Tiles(64, 128, 32, 4, 2),
        64: Tiles(64, 128, 32, 8, 2),
        128: Tiles(32, 128, 32, 8, 2),
        256: Tiles(32, 64, 32, 8, 1),
    },
}
_QUERY_GRADIENT = {
    "sm_80": {
        16: Tiles(128, 32, 32, 4, 2),
        32: Tiles(128, 32, 32, 4, 2),
        64: Tiles(128, 32, 32, 4, 2),
        128: Tiles(128, 32, 32, 8, 2),
        256: Tiles(64, 32, 32, 8, 1),
    },
}
for _t in (_FORWARD, _KEY_GRADIENT, _QUERY_GRADIENT):
    for _f in ("sm_86", "sm_90", "sm_100"):
        _t[_f] = _t["sm_80"]
_SINGLE = {
    16: Tiles(32, 32, 32, 4, 1),
    32: Tiles(32, 32, 32, 4, 1),
    64: Tiles(32, 32, 32, 4, 1),
    128: Tiles(32, 32, 32, 8, 1),
    256: Tiles(16, 32, 32, 8, 1),
}


def forward_tiles(family: str, block_d: int, dtype: torch.dtype, dropout: bool) -> Tiles:
    """Return the config of the forward pass."""
    return _SINGLE[block_d] if dtype == torch.float32 else _FORWARD[family][block_d]


def key_gradient_tiles(family: str, block_d: int, dtype: torch.dtype, dropout: bool) -> Tiles:
    """Return the config of the dk/dv pass."""
    if dtype == torch.float32:
        return _SINGLE[block_d]._replace(edge=_SINGLE[block_d].block_m)
    return _KEY_GRADIENT[family][block_d]


def query_gradient_tiles(family: str, block_d: int, dtype: torch.dtype, dropout: bool) -> Tiles:
    """Return the config of the dq pass."""
    return _SINGLE[block_d] if dtype == torch.float32 else _QUERY_GRADIENT[family][block_d]
