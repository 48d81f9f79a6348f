"""What the feed-forward kernels share: blocks of tokens and weights, dropout and launching."""

from collections.abc import Callable
from itertools import product
from typing import Any, NamedTuple, TypeVar

import triton
import triton.language as tl
from torch import Tensor

from .autotune import tuned, variants
from .common import device_family, launch

Result = TypeVar("Result")

# ------------------------------------------------------------------------------------------------
# Configs
# ------------------------------------------------------------------------------------------------

#: Widest input or output of the resident regime.
MAX_WIDTH = 256

#: BLOCK_M, BLOCK_H, warps, stages.
Config = tuple[int, int, int, int]


def padded(width: int) -> int:
    """Return the width of the tiles that hold rows of `width` values."""
    return max(32, triton.next_power_of_2(width))


class ResidentConfigs(NamedTuple):
    """The tables of a resident block, by the padded width; exceptions go by family first.

    `dropping` takes the place of rows of `backward` for calls with dropout.
    """

    forward: dict[int, Config]
    backward: dict[int, Config]
    dropping: dict[int, Config]
    forward_exceptions: dict[str, dict[int, Config]]
    backward_exceptions: dict[str, dict[int, Config]]

    def of_forward(self, x: Tensor, out_width: int) -> Config:
        """Return the config of the forward kernel for `x` (T, width) on its device."""
        width = padded(max(x.shape[1], out_width))
        exceptions = self.forward_exceptions.get(device_family(x.device), {})
        return exceptions.get(width, self.forward[width])

    def of_backward(self, x: Tensor, out_width: int, drops: bool) -> Config:
        """Return the config of the gradient kernel for `x` (T, width) on its device."""
        width = padded(max(x.shape[1], out_width))
        configs = self.backward | (self.dropping if drops else {})
        exceptions = self.backward_exceptions.get(device_family(x.device), {})
        return exceptions.get(width, configs[width])


def run_resident(
    kernel: triton.JITFunction,
    config: Config,
    arguments: dict[str, Any],
    sizes: tuple[int, ...],
    run: Callable[[Config], Result],
) -> Result:
    """Return what `run` makes of the config of a resident kernel: `config` but for a search.

    `arguments` and `sizes` say what the call is, as for `tuned`.
    """

    def candidates() -> list[Config]:
        blocks = [(*block, 4, 2) for block in product((32, 64, 128), (32, 64))]
        return variants([config, *blocks], warps=2, stages=3)

    return run(tuned(kernel, arguments, sizes, config, candidates, run))


# ------------------------------------------------------------------------------------------------
# Device helpers
# ------------------------------------------------------------------------------------------------


@triton.jit
def load_block(
    ptr, stride, rows, columns, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    BOUND_ROWS: tl.constexpr, BOUND_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Load the block that begins at `ptr`: 0 from row `rows` and column `columns` on.

    Only the bounds that a block can cross are tested: a mask in the loop costs predicates.
    """
    block_rows = tl.arange(0, BLOCK_R)[:, None]  # (BLOCK_R, 1)
    block_columns = tl.arange(0, BLOCK_C)[None, :]  # (1, BLOCK_C)
    # One sum of offsets: a pointer advanced twice takes two additions a row in the loop.
    ptrs = ptr + (block_rows * stride + block_columns)  # (BLOCK_R, BLOCK_C)
    if BOUND_ROWS and BOUND_COLUMNS:
        block = tl.load(ptrs, mask=(block_rows < rows) & (block_columns < columns), other=0.0)
    elif BOUND_ROWS:
        block = tl.load(ptrs, mask=block_rows < rows, other=0.0)
    elif BOUND_COLUMNS:
        block = tl.load(ptrs, mask=block_columns < columns, other=0.0)
    else:
        block = tl.load(ptrs)
    return block  # (BLOCK_R, BLOCK_C)


@triton.jit
def load_tokens(
    ptr, rows, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_W: tl.constexpr
):  # fmt: skip
    """Load the block of tokens (rows, WIDTH) that begins at `ptr`, 0 from column WIDTH on.

    Rows past the end repeat the last one and must not be stored: masks before the loop would cost
    registers in it.
    """
    block_rows = tl.minimum(tl.arange(0, BLOCK_M), rows - 1)[:, None]  # (BLOCK_M, 1)
    columns = tl.arange(0, BLOCK_W)[None, :]  # (1, BLOCK_W)
    ptrs = ptr + (block_rows * WIDTH + columns)  # (BLOCK_M, BLOCK_W)
    if WIDTH != BLOCK_W:
        block = tl.load(ptrs, mask=columns < WIDTH, other=0.0)
    else:
        block = tl.load(ptrs)
    return block  # (BLOCK_M, BLOCK_W)


@triton.jit
def store_block(
    ptr, block, stride, rows, columns, BOUND_COLUMNS: tl.constexpr
):  # fmt: skip
    """Store `block` (BLOCK_R, BLOCK_C) at `ptr` up to row `rows` and column `columns`."""
    block_rows = tl.arange(0, block.shape[0])[:, None]  # (BLOCK_R, 1)
    block_columns = tl.arange(0, block.shape[1])[None, :]  # (1, BLOCK_C)
    # Two sums: one would find its offsets in those of the input, and hold them through the loop.
    ptrs = ptr + block_rows * stride + block_columns  # (BLOCK_R, BLOCK_C)
    inside = block_rows < rows
    if BOUND_COLUMNS:
        inside = inside & (block_columns < columns)
    tl.store(ptrs, block.to(ptr.dtype.element_ty), mask=inside)


# ------------------------------------------------------------------------------------------------
# Launchers
# ------------------------------------------------------------------------------------------------


def dropout_arguments(seed: Tensor | None, dropout_p: float) -> dict[str, object]:
    """Return the arguments by which every kernel of the family takes its dropout."""
    threshold = round(dropout_p * 65536)
    return {
        "seed_ptr": seed if threshold else None,
        "threshold": threshold,
        "dropout_scale": 0.0 if threshold == 65536 else 65536 / (65536 - threshold),
    }


def launch_resident(
    kernel: triton.JITFunction,
    config: Config,
    x: Tensor,
    hidden: int,
    out_width: int,
    arguments: dict[str, object],
) -> None:
    """Launch one program for each block of the tokens in `x`; `arguments` are the kernel's own."""
    block_m, block_h, num_warps, num_stages = config
    arguments = {
        "x_ptr": x,
        "tokens": x.shape[0],
        "WIDTH": x.shape[1],
        "HIDDEN": hidden,
        "OUT": out_width,
        "BLOCK_W": padded(x.shape[1]),
        "BLOCK_O": padded(out_width),
        "BLOCK_M": block_m,
        "BLOCK_H": block_h,
        **arguments,
    }
    blocks = triton.cdiv(x.shape[0], block_m)
    launch(kernel, (blocks,), arguments, num_warps=num_warps, num_stages=num_stages)
