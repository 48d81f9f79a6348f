"""Tile sizes of the attention kernels, by pass, head dim, demand and architecture family.

The tables hold what compiles without spills and within the shared memory, and of that what scores
best (`python -m bench scores`); none of it was timed on a GPU. What decides:

- 8 warps halve the registers a thread needs for a tile, so that tiles of 128 fit; at head dim 256
  the accumulators take so many that tiles shrink. The dk/dv pass holds two accumulators and two
  operands, hence its small tiles. Dropout and what acts on the logits take registers too.
- sm_86: 99 KiB of shared memory, and code that takes more registers.
- sm_90: a wgmma takes 64 rows of each of two warpgroups, and longer tiles spread what a step costs.
  At head dim 256 both backward passes go below those rows, because wgmma spills there: their
  products become mma.sync. So do they on sm_100 in dk/dv for other than lean calls.
- gfx942: 64 KiB of shared memory, and with 4 warps 512 registers for each of 64 threads.
"""

from typing import Literal, NamedTuple, get_args

import torch

from .autotune import variants

#: What a call asks of the registers: "lean" calls fill their tiles and have a key head for each
#: query head, "general" ones need not. "windowed" ones hide the far past, "dropout" ones drop,
#: "logits" ones have something that acts on their logits, "everything" is both of the last.
Demand = Literal["lean", "general", "windowed", "dropout", "logits", "everything"]
DEMANDS: tuple[Demand, ...] = get_args(Demand)
Pass = Literal["forward", "key_gradient", "query_gradient", "bias_gradient"]


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


#: By head dim and demand; a demand that is missing takes the entry of the next lower.
_Table = dict[int, dict[Demand, Tiles]]

# 16-bit inputs.
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
    64: {"logits": Tiles(64, 32, 32, 8, 2)},
    128: {"logits": Tiles(64, 32, 32, 8, 2)},
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
        16: {"lean": Tiles(128, 128, 64, 8, 3), "logits": Tiles(128, 64, 64, 8, 3)},
        64: {"lean": Tiles(128, 128, 64, 8, 2), "logits": Tiles(128, 64, 32, 8, 2)},
        128: {
            "lean": Tiles(128, 128, 32, 8, 2),
            "windowed": Tiles(128, 64, 64, 8, 2),
            "logits": Tiles(128, 64, 32, 8, 2),
        },
        256: {"lean": Tiles(64, 32, 32, 8, 2), "everything": Tiles(32, 32, 32, 8, 2)},
    },
    "sm_100": {
        16: {"lean": Tiles(128, 128, 64, 8, 3), "dropout": Tiles(128, 64, 64, 8, 3)},
        32: {"lean": Tiles(128, 128, 64, 8, 2), "dropout": Tiles(128, 64, 32, 8, 2)},
        64: {
            "lean": Tiles(128, 128, 64, 8, 2),
            "general": Tiles(128, 64, 32, 8, 2),
            "logits": Tiles(128, 64, 64, 8, 2),
            "everything": Tiles(128, 64, 32, 8, 2),
        },
        128: {"lean": Tiles(128, 64, 32, 8, 2), "dropout": Tiles(128, 32, 32, 8, 2)},
    },
    "gfx942": {
        16: {
            "lean": Tiles(128, 128, 64, 8, 2),
            "logits": Tiles(128, 64, 64, 4, 2),
            "everything": Tiles(128, 64, 64, 4, 1),
        },
        32: {"lean": Tiles(128, 64, 64, 4, 2)},
        64: {"lean": Tiles(128, 64, 64, 4, 2)},
        128: {
            "lean": Tiles(128, 128, 64, 4, 2),
            "dropout": Tiles(128, 128, 64, 4, 1),
            "logits": Tiles(128, 64, 32, 4, 1),
            "everything": Tiles(128, 32, 32, 4, 2),
        },
        256: {
            "lean": Tiles(128, 32, 32, 4, 1),
            "dropout": Tiles(128, 32, 32, 4, 2),
            "logits": Tiles(128, 32, 32, 4, 1),
        },
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
        128: {
            "lean": Tiles(32, 64, 32, 8, 2),
            "dropout": Tiles(16, 64, 16, 8, 2),
            "logits": Tiles(32, 64, 32, 8, 2),
            "everything": Tiles(16, 32, 16, 8, 2),
        },
        256: {
            "lean": Tiles(16, 64, 16, 8, 1),
            "general": Tiles(16, 32, 16, 8, 1),
            "logits": Tiles(16, 32, 16, 8, 2),
            "everything": Tiles(16, 32, 16, 8, 1),
        },
    },
    "sm_90": {
        16: {
            "lean": Tiles(64, 128, 32, 8, 2),
            "dropout": Tiles(64, 128, 64, 8, 2),
            "logits": Tiles(32, 128, 32, 8, 2),
        },
        64: {
            "lean": Tiles(64, 128, 32, 8, 2),
            "general": Tiles(32, 64, 32, 8, 2),
            "dropout": Tiles(32, 64, 32, 8, 1),
            "logits": Tiles(32, 32, 32, 4, 2),
        },
        128: {
            "lean": Tiles(32, 128, 32, 8, 2),
            "general": Tiles(16, 64, 16, 8, 2),
            "dropout": Tiles(16, 32, 16, 4, 2),
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
        64: {
            "lean": Tiles(64, 128, 32, 8, 2),
            "general": Tiles(32, 64, 32, 8, 2),
            "everything": Tiles(32, 32, 32, 4, 2),
        },
        128: {"lean": Tiles(32, 64, 16, 4, 2), "general": Tiles(32, 64, 32, 8, 1)},
        256: {
            "lean": Tiles(32, 64, 32, 8, 1),
            "general": Tiles(16, 32, 16, 8, 1),
            "logits": Tiles(16, 32, 16, 8, 2),
            "everything": Tiles(16, 32, 16, 8, 1),
        },
    },
    "gfx942": {
        16: {"lean": Tiles(32, 64, 32, 4, 2)},
        32: {"lean": Tiles(32, 64, 32, 4, 2)},
        64: {"lean": Tiles(32, 64, 32, 4, 2)},
        128: {"lean": Tiles(32, 64, 32, 4, 2), "logits": Tiles(32, 64, 32, 4, 1)},
        256: {"lean": Tiles(32, 32, 32, 4, 1), "logits": Tiles(16, 32, 16, 4, 1)},
    },
}
_QUERY_EXCEPTIONS: dict[str, _Table] = {
    "sm_86": {
        16: {"lean": Tiles(64, 64, 64, 8, 2)},
        256: {
            "lean": Tiles(32, 32, 32, 8, 2),
            "dropout": Tiles(32, 32, 32, 8, 1),
            "logits": Tiles(32, 32, 32, 8, 2),
        },
    },
    "sm_90": {256: {"lean": Tiles(32, 32, 32, 8, 1)}},
    "sm_100": {
        32: {"lean": Tiles(128, 64, 64, 8, 2), "everything": Tiles(128, 64, 32, 8, 2)},
        256: {"lean": Tiles(64, 32, 32, 8, 1), "dropout": Tiles(64, 32, 32, 8, 2)},
    },
    "gfx942": {
        16: {"lean": Tiles(128, 32, 32, 4, 2)},
        32: {"lean": Tiles(128, 32, 32, 4, 2)},
        64: {"lean": Tiles(128, 32, 32, 4, 2)},
        128: {"lean": Tiles(128, 32, 32, 4, 2)},
        256: {
            "lean": Tiles(64, 32, 32, 4, 1),
            "dropout": Tiles(32, 32, 32, 4, 1),
            "logits": Tiles(64, 32, 32, 4, 1),
        },
    },
}
_BIAS_EXCEPTIONS: dict[str, _Table] = {
    "sm_80": {
        16: {"logits": Tiles(64, 64, 64, 8, 2), "everything": Tiles(64, 32, 32, 8, 2)},
        32: {"logits": Tiles(64, 64, 64, 8, 2), "everything": Tiles(64, 32, 32, 8, 2)},
        128: {"logits": Tiles(32, 32, 32, 8, 2), "everything": Tiles(64, 32, 32, 8, 2)},
    },
    "sm_86": {
        16: {"logits": Tiles(32, 64, 64, 8, 2), "everything": Tiles(32, 32, 32, 8, 2)},
        32: {"logits": Tiles(32, 64, 64, 8, 2)},
        128: {"logits": Tiles(32, 32, 32, 8, 2)},
    },
    "sm_100": {32: {"logits": Tiles(64, 32, 32, 8, 2)}},
    "gfx942": {
        16: {"logits": Tiles(64, 64, 64, 8, 2)},
        32: {"logits": Tiles(64, 64, 64, 8, 2), "everything": Tiles(64, 64, 64, 8, 1)},
        64: {"logits": Tiles(64, 64, 64, 8, 2), "everything": Tiles(64, 64, 64, 8, 1)},
        128: {"logits": Tiles(64, 64, 64, 8, 1), "everything": Tiles(64, 64, 64, 4, 1)},
        256: {"logits": Tiles(64, 64, 64, 4, 1)},
    },
}

# Single precision has no tensor cores: small tiles.
_FORWARD_SINGLE: _Table = {
    16: {"lean": Tiles(32, 32, 32, 4, 1)},
    32: {"lean": Tiles(32, 32, 32, 4, 1)},
    64: {"lean": Tiles(32, 32, 32, 8, 1)},
    128: {"lean": Tiles(16, 32, 32, 8, 1)},
    256: {"lean": Tiles(16, 32, 32, 8, 1)},
}
_KEY_SINGLE: _Table = {
    16: {"lean": Tiles(32, 32, 32, 4, 1)},
    32: {"lean": Tiles(32, 32, 32, 4, 1)},
    64: {"lean": Tiles(32, 32, 32, 8, 1), "logits": Tiles(16, 32, 16, 8, 1)},
    128: {"lean": Tiles(16, 32, 16, 16, 2), "logits": Tiles(16, 32, 16, 8, 2)},
    256: {"lean": Tiles(16, 32, 16, 8, 2), "logits": Tiles(16, 32, 16, 8, 3)},
}
_QUERY_SINGLE: _Table = {
    16: {"lean": Tiles(32, 32, 32, 4, 1)},
    32: {"lean": Tiles(32, 32, 32, 8, 1)},
    64: {"lean": Tiles(32, 32, 32, 8, 1)},
    128: {"lean": Tiles(32, 32, 32, 4, 1), "logits": Tiles(32, 32, 32, 16, 1)},
    256: {"lean": Tiles(16, 32, 32, 16, 1)},
}
_BIAS_SINGLE: _Table = {
    16: {"logits": Tiles(32, 32, 32, 8, 1)},
    32: {"logits": Tiles(32, 32, 32, 8, 1)},
    64: {"logits": Tiles(32, 32, 32, 8, 1)},
    128: {"logits": Tiles(32, 32, 32, 8, 1)},
    256: {"logits": Tiles(16, 32, 32, 8, 1)},
}
_FORWARD_SINGLE_EXCEPTIONS: dict[str, _Table] = {
    "sm_86": {256: {"lean": Tiles(16, 32, 32, 16, 2)}},
    "sm_90": {256: {"lean": Tiles(16, 32, 32, 8, 2)}},
    "sm_100": {256: {"lean": Tiles(16, 32, 32, 8, 2)}},
    "gfx942": {dim: {"lean": Tiles(32, 32, 32, 4, 1)} for dim in (64, 128, 256)},
}
_KEY_SINGLE_EXCEPTIONS: dict[str, _Table] = {
    "sm_80": {256: {"lean": Tiles(16, 32, 16, 8, 2)}},
    "sm_86": {
        16: {"lean": Tiles(32, 32, 32, 4, 1), "logits": Tiles(16, 32, 16, 4, 1)},
        128: {"lean": Tiles(16, 32, 16, 16, 2), "logits": Tiles(16, 32, 16, 16, 3)},
        256: {"lean": Tiles(16, 32, 16, 8, 2), "logits": Tiles(16, 32, 16, 16, 1)},
    },
    "sm_100": {128: {"lean": Tiles(16, 32, 16, 16, 2), "logits": Tiles(16, 32, 16, 16, 3)}},
    "gfx942": {
        64: {"lean": Tiles(32, 32, 32, 4, 1)},
        128: {"lean": Tiles(32, 32, 32, 4, 1)},
        256: {"lean": Tiles(16, 32, 16, 4, 1)},
    },
}
_QUERY_SINGLE_EXCEPTIONS: dict[str, _Table] = {
    "sm_86": {
        64: {"lean": Tiles(32, 32, 32, 8, 1), "logits": Tiles(32, 32, 32, 8, 2)},
        128: {"lean": Tiles(32, 32, 32, 8, 1), "logits": Tiles(32, 32, 32, 16, 1)},
        256: {"lean": Tiles(16, 32, 32, 8, 1), "logits": Tiles(16, 32, 32, 16, 1)},
    },
    "sm_90": {128: {"lean": Tiles(32, 32, 32, 4, 1), "logits": Tiles(32, 32, 32, 8, 1)}},
    "sm_100": {128: {"lean": Tiles(32, 32, 32, 8, 1), "logits": Tiles(32, 32, 32, 16, 1)}},
    "gfx942": {
        32: {"lean": Tiles(32, 32, 32, 4, 1)},
        64: {"lean": Tiles(32, 32, 32, 4, 1)},
        128: {"lean": Tiles(32, 32, 32, 4, 1)},
        256: {"lean": Tiles(16, 32, 32, 4, 1)},
    },
}
_BIAS_SINGLE_EXCEPTIONS: dict[str, _Table] = {
    "gfx942": {
        16: {"logits": Tiles(32, 32, 32, 4, 1)},
        32: {"logits": Tiles(32, 32, 32, 4, 1)},
        64: {"logits": Tiles(32, 32, 32, 4, 1)},
        128: {"logits": Tiles(32, 32, 32, 4, 1)},
        256: {"logits": Tiles(16, 32, 32, 4, 1)},
    }
}


class _Configs(NamedTuple):
    """The tables of a pass, each with what takes the place of its rows in a family."""

    half: _Table
    half_exceptions: dict[str, _Table]
    single: _Table
    single_exceptions: dict[str, _Table]


_CONFIGS: dict[Pass, _Configs] = {
    "forward": _Configs(_FORWARD, _FORWARD_EXCEPTIONS, _FORWARD_SINGLE, _FORWARD_SINGLE_EXCEPTIONS),
    "key_gradient": _Configs(_KEY_GRADIENT, _KEY_EXCEPTIONS, _KEY_SINGLE, _KEY_SINGLE_EXCEPTIONS),
    "query_gradient": _Configs(
        _QUERY_GRADIENT, _QUERY_EXCEPTIONS, _QUERY_SINGLE, _QUERY_SINGLE_EXCEPTIONS
    ),
    "bias_gradient": _Configs(
        _BIAS_GRADIENT, _BIAS_EXCEPTIONS, _BIAS_SINGLE, _BIAS_SINGLE_EXCEPTIONS
    ),
}


def attention_tiles(
    which: Pass, family: str, block_d: int, dtype: torch.dtype, demand: Demand
) -> Tiles:
    """Return the config of a pass for `demand`, or the one for less where they are the same."""
    half, half_exceptions, single, single_exceptions = _CONFIGS[which]
    if dtype == torch.float32:
        row = single_exceptions.get(family, {}).get(block_d) or single[block_d]
    else:
        row = half_exceptions.get(family, {}).get(block_d) or half[block_d]
    for lower in reversed(DEMANDS[: DEMANDS.index(demand) + 1]):
        if lower in row:
            return row[lower]
    raise KeyError(f"no config of the {which} pass for head dim {block_d} on {family}")


def paged_tiles(tiles: Tiles) -> Tiles:
    """Return the config of the forward pass over pages, from that over rows in order.

    Where each row lies takes registers. The compiler spreads the stages over the loads of pages'
    numbers and those of their keys.
    """
    return tiles._replace(
        block_n=min(tiles.block_n, 64), edge=min(tiles.edge, 32), stages=2 * tiles.stages - 1
    )


def candidates(which: Pass, block_d: int, dtype: torch.dtype) -> list[Tiles]:
    """Return what a search of a pass tries: the tiles of every family and demand."""
    half, half_exceptions, single, single_exceptions = _CONFIGS[which]
    tables = [half, *half_exceptions.values()]
    if dtype == torch.float32:
        tables = [single, *single_exceptions.values()]
    found = [tiles for table in tables for tiles in table.get(block_d, {}).values()]
    return variants(found, warps=Tiles._fields.index("warps"), stages=Tiles._fields.index("stages"))
