"""Tile sizes of the attention kernels, by pass, head dim, demand and architecture family.

The tables hold what compiles without spills and within the shared memory; none of it was timed on
a GPU. Where a family cannot take the numbers of sm_80 it has its own. What decides: 8 warps halve
the registers a thread needs for a tile, so that tiles of 128 fit; at head dim 256 the accumulators
take so many that tiles shrink. The dk/dv pass holds two accumulators and two operands, hence its
small tiles. At head dim 256 those of both backward passes on sm_90, and of dk/dv on sm_100 for
other than lean calls, go below the 64 rows that the newer tensor-core instructions need, which
spill there: products become mma.sync.
"""

from typing import Literal, NamedTuple

import torch

#: What a call asks of the registers: "lean" calls fill their tiles, have a key head for each query
#: head, no dropout and nothing that acts on their logits; "general" ones lack the last two,
#: "logits" ones the dropout.
Demand = Literal["lean", "general", "dropout", "logits", "everything"]


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


_Row = dict[Demand, Tiles]
_Table = dict[int, _Row]
_Singles = dict[int | tuple[str, int], Tiles]

#: 16-bit inputs by head dim and demand. A demand that is missing takes the row of the next lower.
_FORWARD: _Table = {
    16: {"lean": Tiles(128, 128, 64, 8, 3)},
    32: {"lean": Tiles(128, 128, 64, 8, 2)},
    64: {"lean": Tiles(128, 128, 64, 8, 2)},
    128: {
        "lean": Tiles(128, 64, 32, 8, 2),
        "dropout": Tiles(128, 32, 32, 8, 2),
        "logits": Tiles(128, 64, 32, 8, 2),
    },
    256: {"lean": Tiles(64, 64, 32, 8, 2)},
}
_KEY_GRADIENT: _Table = {
    16: {"lean": Tiles(64, 128, 32, 8, 2), "logits": Tiles(32, 128, 32, 8, 2)},
    32: {
        "lean": Tiles(64, 128, 64, 8, 2),
        "dropout": Tiles(32, 128, 32, 8, 2),
        "logits": Tiles(32, 64, 32, 8, 1),
    },
    64: {
        "lean": Tiles(64, 128, 32, 8, 2),
        "general": Tiles(32, 64, 32, 8, 2),
        "dropout": Tiles(32, 64, 32, 8, 1),
        "everything": Tiles(32, 32, 32, 4, 2),
    },
    128: {
        "lean": Tiles(32, 64, 16, 4, 2),
        "general": Tiles(32, 64, 32, 8, 2),
        "dropout": Tiles(32, 64, 32, 8, 1),
        "logits": Tiles(32, 64, 32, 8, 2),
        "everything": Tiles(32, 32, 32, 8, 1),
    },
    256: {
        "lean": Tiles(32, 64, 32, 8, 1),
        "general": Tiles(16, 64, 16, 8, 1),
        "logits": Tiles(16, 32, 16, 8, 2),
    },
}
_QUERY_GRADIENT: _Table = {
    16: {"lean": Tiles(128, 64, 64, 8, 2)},
    32: {"lean": Tiles(128, 64, 64, 8, 2)},
    64: {"lean": Tiles(128, 64, 64, 8, 2), "logits": Tiles(128, 32, 32, 8, 2)},
    128: {"lean": Tiles(128, 32, 32, 8, 2), "logits": Tiles(64, 32, 32, 8, 2)},
    256: {
        "lean": Tiles(64, 32, 32, 8, 1),
        "dropout": Tiles(32, 32, 32, 8, 2),
        "logits": Tiles(64, 32, 32, 8, 2),
    },
}
# The bias gradient holds one accumulator, and both operands of both products at once.
_BIAS_GRADIENT: _Table = {
    16: {"logits": Tiles(64, 64, 64, 8, 2)},
    32: {"logits": Tiles(64, 64, 64, 8, 2)},
    64: {"logits": Tiles(32, 64, 64, 4, 2)},
    128: {"logits": Tiles(32, 64, 64, 8, 2)},
    256: {"logits": Tiles(32, 64, 64, 8, 1)},
}

#: Rows that take the place of those above in a family.
_FORWARD_EXCEPTIONS: dict[str, _Table] = {
    "sm_86": {
        32: {"lean": Tiles(128, 128, 64, 8, 2), "logits": Tiles(128, 64, 64, 8, 2)},
        64: {"lean": Tiles(128, 128, 64, 8, 2), "logits": Tiles(128, 64, 32, 8, 2)},
        128: {"lean": Tiles(128, 64, 32, 8, 2), "logits": Tiles(128, 32, 32, 8, 2)},
        256: {"lean": Tiles(64, 32, 32, 8, 2)},
    },
    "sm_90": {
        64: {"lean": Tiles(128, 128, 64, 8, 2), "logits": Tiles(128, 64, 32, 8, 2)},
        256: {"lean": Tiles(64, 32, 32, 8, 2), "logits": Tiles(32, 32, 32, 8, 1)},
    },
    "sm_100": {
        16: {"lean": Tiles(128, 128, 64, 8, 3), "dropout": Tiles(128, 64, 64, 8, 3)},
        32: {"lean": Tiles(128, 128, 64, 8, 2), "dropout": Tiles(128, 64, 32, 8, 2)},
        64: {"lean": Tiles(128, 128, 64, 8, 2), "general": Tiles(128, 64, 32, 8, 2)},
        128: {"lean": Tiles(128, 64, 32, 8, 2), "dropout": Tiles(128, 32, 32, 8, 2)},
    },
}
_KEY_EXCEPTIONS: dict[str, _Table] = {
    "sm_86": {
        64: {
            "lean": Tiles(64, 128, 32, 8, 2),
            "general": Tiles(32, 64, 32, 8, 2),
            "dropout": Tiles(32, 128, 32, 8, 1),
            "logits": Tiles(32, 64, 32, 8, 1),
            "everything": Tiles(32, 32, 32, 4, 2),
        },
        128: {"lean": Tiles(32, 64, 32, 8, 2)},
        256: {
            "lean": Tiles(16, 64, 16, 8, 1),
            "general": Tiles(16, 32, 16, 8, 1),
            "logits": Tiles(16, 32, 16, 8, 2),
        },
    },
    "sm_90": {
        128: {
            "lean": Tiles(32, 128, 32, 8, 2),
            "general": Tiles(16, 64, 16, 8, 2),
            "logits": Tiles(32, 32, 32, 8, 1),
        },
        256: {"lean": Tiles(16, 32, 16, 8, 1), "logits": Tiles(16, 32, 16, 8, 2)},
    },
    "sm_100": {
        16: {"lean": Tiles(64, 128, 32, 8, 2), "logits": Tiles(32, 64, 32, 8, 2)},
        32: {
            "lean": Tiles(64, 128, 64, 8, 2),
            "general": Tiles(32, 128, 32, 8, 2),
            "dropout": Tiles(32, 128, 32, 8, 2),
            "logits": Tiles(32, 64, 32, 8, 2),
        },
        64: {"lean": Tiles(64, 128, 32, 8, 2), "general": Tiles(32, 64, 32, 8, 2)},
        128: {"lean": Tiles(32, 64, 16, 4, 2), "general": Tiles(32, 64, 32, 8, 1)},
        256: {
            "lean": Tiles(32, 64, 32, 8, 1),
            "general": Tiles(16, 32, 16, 8, 1),
            "logits": Tiles(16, 32, 16, 8, 2),
        },
    },
}
_QUERY_EXCEPTIONS: dict[str, _Table] = {
    "sm_86": {256: {"lean": Tiles(32, 32, 32, 8, 1)}},
    "sm_90": {256: {"lean": Tiles(32, 32, 32, 8, 1)}},
}
_BIAS_EXCEPTIONS: dict[str, _Table] = {
    "sm_86": {dim: {"logits": Tiles(32, 64, 64, 8, 2)} for dim in (16, 32)}
}

# Single precision has no tensor cores: small tiles, the same for every demand, and but for the rows
# that name a family for every one.
_FORWARD_SINGLE: _Singles = {
    16: Tiles(32, 32, 32, 4, 1),
    32: Tiles(32, 32, 32, 4, 1),
    64: Tiles(32, 32, 32, 8, 1),
    128: Tiles(16, 32, 32, 8, 1),
    256: Tiles(16, 32, 32, 8, 1),
    ("sm_86", 256): Tiles(16, 32, 32, 16, 2),
    ("sm_90", 256): Tiles(16, 32, 32, 8, 2),
    ("sm_100", 256): Tiles(16, 32, 32, 8, 2),
}
_KEY_SINGLE: _Singles = {
    16: Tiles(32, 32, 32, 4, 1),
    32: Tiles(32, 32, 32, 4, 1),
    64: Tiles(32, 32, 32, 8, 1),
    128: Tiles(16, 32, 16, 16, 2),
    256: Tiles(16, 32, 16, 8, 2),
}
_QUERY_SINGLE: _Singles = {
    16: Tiles(32, 32, 32, 4, 1),
    32: Tiles(32, 32, 32, 8, 1),
    64: Tiles(32, 32, 32, 8, 1),
    128: Tiles(32, 32, 32, 4, 1),
    ("sm_86", 128): Tiles(32, 32, 32, 8, 1),
    ("sm_100", 128): Tiles(32, 32, 32, 8, 1),
    256: Tiles(16, 32, 32, 16, 1),
}
_BIAS_SINGLE: _Singles = {
    16: Tiles(32, 32, 32, 8, 1),
    32: Tiles(32, 32, 32, 8, 1),
    64: Tiles(32, 32, 32, 8, 1),
    128: Tiles(32, 32, 32, 8, 1),
    256: Tiles(16, 32, 32, 8, 1),
}


def _tiles(
    table: _Table,
    exceptions: dict[str, _Table],
    single: _Singles,
    family: str,
    block_d: int,
    dtype: torch.dtype,
    demand: Demand,
) -> Tiles:
    """Return the config for `demand`, or the one for less where they are the same."""
    if dtype == torch.float32:
        return single.get((family, block_d)) or single[block_d]
    row = exceptions.get(family, {}).get(block_d) or table[block_d]
    order: tuple[Demand, ...] = ("lean", "general", "dropout", "logits", "everything")
    for lower in reversed(order[: order.index(demand) + 1]):
        if lower in row:
            return row[lower]
    raise KeyError(f"no config for head dim {block_d} on {family}")


def forward_tiles(family: str, block_d: int, dtype: torch.dtype, demand: Demand) -> Tiles:
    """Return the config of the forward pass."""
    return _tiles(_FORWARD, _FORWARD_EXCEPTIONS, _FORWARD_SINGLE, family, block_d, dtype, demand)


def key_gradient_tiles(family: str, block_d: int, dtype: torch.dtype, demand: Demand) -> Tiles:
    """Return the config of the dk/dv pass."""
    return _tiles(_KEY_GRADIENT, _KEY_EXCEPTIONS, _KEY_SINGLE, family, block_d, dtype, demand)


def query_gradient_tiles(family: str, block_d: int, dtype: torch.dtype, demand: Demand) -> Tiles:
    """Return the config of the dq pass."""
    return _tiles(_QUERY_GRADIENT, _QUERY_EXCEPTIONS, _QUERY_SINGLE, family, block_d, dtype, demand)


def bias_gradient_tiles(family: str, block_d: int, dtype: torch.dtype, demand: Demand) -> Tiles:
    """Return the config of the dbias pass."""
    return _tiles(_BIAS_GRADIENT, _BIAS_EXCEPTIONS, _BIAS_SINGLE, family, block_d, dtype, demand)
