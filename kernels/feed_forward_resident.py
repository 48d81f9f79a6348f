"""Feed-forward blocks in Triton, resident regime: hidden activations live in registers only.

A program keeps a block of tokens and walks over the hidden dimension as flash attention walks over
keys: product, activation, product. Backward recomputes the hidden tile in the same walk, carries dx
along, and hands the gradients of the hidden tile, a chunk of tokens at a time, to the vendor's
matmul for the weight gradients: those sum over tokens, which is what a program here does not own.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import activate
from .common import device_family, dropout_keep, launch

# ------------------------------------------------------------------------------------------------
# Configs
# ------------------------------------------------------------------------------------------------

MAX_WIDTH = 256

# Under this many programs most of a large GPU idles while each walks the whole hidden dimension.
_MIN_PROGRAMS = 64

# Hidden gradients and activations that backward materialises at once.
_CHUNK_BYTES = 1 << 28

_Config = tuple[int, int, int, int]

# (BLOCK_M, BLOCK_H, warps, stages) by the padded width; all compile without spills.
_FORWARD_CONFIGS: dict[int, _Config] = {
    32: (128, 64, 4, 3),
    64: (64, 64, 4, 3),
    128: (128, 64, 8, 2),
    256: (128, 32, 8, 2),
}
_BACKWARD_CONFIGS: dict[int, _Config] = {
    32: (64, 64, 4, 2),
    64: (64, 32, 4, 2),
    128: (64, 64, 8, 2),
    256: (64, 32, 8, 2),
}

# What differs from the tables above in a family.
_FORWARD_EXCEPTIONS: dict[str, dict[int, _Config]] = {"sm_86": {256: (64, 32, 8, 2)}}
_BACKWARD_EXCEPTIONS: dict[str, dict[int, _Config]] = {
    "sm_86": {256: (32, 32, 8, 2)},
    "sm_90": {256: (32, 32, 8, 2)},
}


def _padded(width: int) -> int:
    return max(32, triton.next_power_of_2(width))


def _forward_config(x: Tensor, out_width: int) -> _Config:
    """Return the config of the forward kernel for `x` (T, width) on its device."""
    padded = _padded(max(x.shape[1], out_width))
    exceptions = _FORWARD_EXCEPTIONS.get(device_family(x.device), {})
    return exceptions.get(padded, _FORWARD_CONFIGS[padded])


def _backward_config(x: Tensor, out_width: int) -> _Config:
    """Return the config of the gradient kernel for `x` (T, width) on its device."""
    padded = _padded(max(x.shape[1], out_width))
    exceptions = _BACKWARD_EXCEPTIONS.get(device_family(x.device), {})
    return exceptions.get(padded, _BACKWARD_CONFIGS[padded])


# ------------------------------------------------------------------------------------------------
# Device helpers
# ------------------------------------------------------------------------------------------------


@triton.jit
def _load_block(
    ptr, stride, rows, columns, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    BOUND_ROWS: tl.constexpr, BOUND_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Load the block that begins at `ptr`: 0 from row `rows` and column `columns` on.

    Only the bounds that a block can cross are tested: a mask in the loop costs predicates.
    """
    block_rows = tl.arange(0, BLOCK_R)[:, None]  # (BLOCK_R, 1)
    block_columns = tl.arange(0, BLOCK_C)[None, :]  # (1, BLOCK_C)
    ptrs = ptr + block_rows * stride + block_columns  # (BLOCK_R, BLOCK_C)
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
def _store_block(
    ptr, block, stride, rows, columns, BOUND_COLUMNS: tl.constexpr
):  # fmt: skip
    """Store `block` (BLOCK_R, BLOCK_C) at `ptr` up to row `rows` and column `columns`."""
    block_rows = tl.arange(0, block.shape[0])[:, None]  # (BLOCK_R, 1)
    block_columns = tl.arange(0, block.shape[1])[None, :]  # (1, BLOCK_C)
    ptrs = ptr + block_rows * stride + block_columns  # (BLOCK_R, BLOCK_C)
    inside = block_rows < rows
    if BOUND_COLUMNS:
        inside = inside & (block_columns < columns)
    tl.store(ptrs, block.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def _hidden_blocks(
    x, w1_ptr, b1_ptr, w2_ptr, start,
    WIDTH: tl.constexpr, HIDDEN: tl.constexpr, OUT: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Return the pre-activation of the hidden units from `start` on, and their weight blocks."""
    RAGGED: tl.constexpr = HIDDEN % BLOCK_H != 0
    left = HIDDEN - start
    w1 = _load_block(
        w1_ptr + start * WIDTH, WIDTH, left, WIDTH, BLOCK_H, BLOCK_W, RAGGED, WIDTH != BLOCK_W
    )  # (BLOCK_H, BLOCK_W)
    w2 = _load_block(
        w2_ptr + start, HIDDEN, OUT, left, BLOCK_O, BLOCK_H, OUT != BLOCK_O, RAGGED
    )  # (BLOCK_O, BLOCK_H)
    pre = tl.dot(x, tl.trans(w1))  # (BLOCK_M, BLOCK_H)
    if b1_ptr is not None:
        units = tl.arange(0, BLOCK_H)  # (BLOCK_H,)
        b1 = tl.load(b1_ptr + start + units, mask=units < left, other=0.0)  # (BLOCK_H,)
        pre += b1.to(tl.float32)[None, :]
    return pre, w1, w2


# ------------------------------------------------------------------------------------------------
# Kernels
# ------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["tokens", "threshold"])
def feed_forward_resident_kernel(
    x_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr, y_ptr, seed_ptr,
    tokens, threshold, dropout_scale,
    WIDTH: tl.constexpr, HIDDEN: tl.constexpr, OUT: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_O: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Compute the output rows of one block of tokens.

    Grid: (token blocks,). All tensors are contiguous: x (tokens, WIDTH), w1 (HIDDEN, WIDTH), w2
    (OUT, HIDDEN), y (tokens, OUT).
    """
    row = tl.program_id(0) * BLOCK_M
    x = _load_block(
        x_ptr + row.to(tl.int64) * WIDTH, WIDTH, tokens - row, WIDTH,
        BLOCK_M, BLOCK_W, True, WIDTH != BLOCK_W,
    )  # (BLOCK_M, BLOCK_W)  # fmt: skip
    seed = 0
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    acc = tl.zeros((BLOCK_M, BLOCK_O), tl.float32)
    for start in range(0, HIDDEN, BLOCK_H):
        pre, _, w2 = _hidden_blocks(
            x, w1_ptr, b1_ptr, w2_ptr, start, WIDTH, HIDDEN, OUT, BLOCK_W, BLOCK_O, BLOCK_H
        )
        act, _ = activate(pre, ACTIVATION)  # (BLOCK_M, BLOCK_H)
        if seed_ptr is not None:
            keep = dropout_keep(seed, 0, 0, row, start, threshold, BLOCK_M, BLOCK_H)
            act = tl.where(keep, act * dropout_scale, 0.0)
        acc = tl.dot(act.to(w2.dtype), tl.trans(w2), acc)
    if b2_ptr is not None:
        columns = tl.arange(0, BLOCK_O)  # (BLOCK_O,)
        b2 = tl.load(b2_ptr + columns, mask=columns < OUT, other=0.0)  # (BLOCK_O,)
        acc += b2.to(tl.float32)[None, :]
    y_ptr += row.to(tl.int64) * OUT
    _store_block(y_ptr, acc, OUT, tokens - row, OUT, OUT != BLOCK_O)


@triton.jit(do_not_specialize=["first_row", "tokens", "threshold"])
def feed_forward_resident_gradient_kernel(
    dy_ptr, x_ptr, w1_ptr, b1_ptr, w2_ptr, dx_ptr, dpre_ptr, act_ptr, db1_ptr, seed_ptr,
    first_row, tokens, threshold, dropout_scale,
    WIDTH: tl.constexpr, HIDDEN: tl.constexpr, OUT: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_O: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Compute dx of one block of tokens, and the hidden tile that the weight gradients need.

    Grid: (token blocks,). The pointers begin at token `first_row` of the call, which the dropout
    mask needs to know. dpre and act are (tokens, HIDDEN) contiguous, db1 (token blocks, HIDDEN)
    float32 partial sums.
    """
    block = tl.program_id(0).to(tl.int64)
    row = tl.program_id(0) * BLOCK_M
    left = tokens - row
    x = _load_block(
        x_ptr + block * BLOCK_M * WIDTH, WIDTH, left, WIDTH,
        BLOCK_M, BLOCK_W, True, WIDTH != BLOCK_W,
    )  # (BLOCK_M, BLOCK_W)  # fmt: skip
    dy = _load_block(
        dy_ptr + block * BLOCK_M * OUT, OUT, left, OUT, BLOCK_M, BLOCK_O, True, OUT != BLOCK_O
    )  # (BLOCK_M, BLOCK_O)
    dpre_ptr += block * BLOCK_M * HIDDEN
    act_ptr += block * BLOCK_M * HIDDEN
    seed = 0
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    acc = tl.zeros((BLOCK_M, BLOCK_W), tl.float32)
    for start in range(0, HIDDEN, BLOCK_H):
        pre, w1, w2 = _hidden_blocks(
            x, w1_ptr, b1_ptr, w2_ptr, start, WIDTH, HIDDEN, OUT, BLOCK_W, BLOCK_O, BLOCK_H
        )
        act, slope = activate(pre, ACTIVATION)  # (BLOCK_M, BLOCK_H)
        dpre = tl.dot(dy, w2)  # (BLOCK_M, BLOCK_H)
        if seed_ptr is not None:
            keep = dropout_keep(seed, 0, 0, first_row + row, start, threshold, BLOCK_M, BLOCK_H)
            act = tl.where(keep, act * dropout_scale, 0.0)
            dpre = tl.where(keep, dpre * dropout_scale, 0.0)
        dpre *= slope
        if db1_ptr is not None:
            # Rows past the end have dy = 0 and add nothing.
            units = tl.arange(0, BLOCK_H)  # (BLOCK_H,)
            db1_ptrs = db1_ptr + block * HIDDEN + start + units  # (BLOCK_H,)
            tl.store(db1_ptrs, tl.sum(dpre, 0), mask=units < HIDDEN - start)
        narrow = dpre.to(w1.dtype)  # (BLOCK_M, BLOCK_H)
        RAGGED: tl.constexpr = HIDDEN % BLOCK_H != 0
        _store_block(act_ptr + start, act, HIDDEN, left, HIDDEN - start, RAGGED)
        _store_block(dpre_ptr + start, narrow, HIDDEN, left, HIDDEN - start, RAGGED)
        acc = tl.dot(narrow, w1, acc)
    dx_ptr += block * BLOCK_M * WIDTH
    _store_block(dx_ptr, acc, WIDTH, left, WIDTH, WIDTH != BLOCK_W)


# ------------------------------------------------------------------------------------------------
# Launchers
# ------------------------------------------------------------------------------------------------


def enough_tokens(x: Tensor, out_width: int) -> bool:
    """Return whether the blocks of tokens of `x` (T, width) occupy a GPU in this regime."""
    return x.shape[0] >= _MIN_PROGRAMS * _forward_config(x, out_width)[0]


def _launch(
    kernel: triton.JITFunction,
    config: _Config,
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    arguments: dict[str, object],
) -> None:
    """Launch one program for each block of the tokens in `x`; `arguments` are the kernel's own."""
    block_m, block_h, num_warps, num_stages = config
    arguments = {
        "x_ptr": x,
        "w1_ptr": w1,
        "w2_ptr": w2,
        "tokens": x.shape[0],
        "WIDTH": x.shape[1],
        "HIDDEN": w1.shape[0],
        "OUT": w2.shape[0],
        "BLOCK_W": _padded(x.shape[1]),
        "BLOCK_O": _padded(w2.shape[0]),
        "BLOCK_M": block_m,
        "BLOCK_H": block_h,
        **arguments,
    }
    blocks = triton.cdiv(x.shape[0], block_m)
    launch(kernel, (blocks,), arguments, num_warps=num_warps, num_stages=num_stages)


def resident_forward(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str,
    dropout: dict[str, object],
) -> Tensor:
    """Return the output (T, out) of contiguous tensors; `dropout` holds arguments of the kernel."""
    y = x.new_empty(x.shape[0], w2.shape[0])
    config = _forward_config(x, w2.shape[0])
    arguments = {"b1_ptr": b1, "b2_ptr": b2, "y_ptr": y, "ACTIVATION": activation, **dropout}
    _launch(feed_forward_resident_kernel, config, x, w1, w2, arguments)
    return y


def resident_backward(
    dy: Tensor,
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    activation: str,
    dropout: dict[str, object],
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Return the gradients of x, w1, b1 and w2; arguments as in `resident_forward`."""
    tokens, hidden = x.shape[0], w1.shape[0]
    config = _backward_config(x, w2.shape[0])
    block_m = config[0]
    chunk = max(1, _CHUNK_BYTES // (2 * hidden * x.element_size() * block_m)) * block_m
    dx = torch.empty_like(x)
    db1 = None
    if b1 is not None:
        db1 = x.new_empty(triton.cdiv(tokens, block_m), hidden, dtype=torch.float32)
    dw1: Tensor | None = None
    dw2: Tensor | None = None
    for start in range(0, max(1, tokens), chunk):
        rows = slice(start, min(start + chunk, tokens))
        dpre = x.new_empty(rows.stop - rows.start, hidden)
        act = torch.empty_like(dpre)
        arguments = {
            "dy_ptr": dy[rows],
            "b1_ptr": b1,
            "dx_ptr": dx[rows],
            "dpre_ptr": dpre,
            "act_ptr": act,
            "db1_ptr": None if db1 is None else db1[start // block_m :],
            "first_row": start,
            "ACTIVATION": activation,
            **dropout,
        }
        _launch(feed_forward_resident_gradient_kernel, config, x[rows], w1, w2, arguments)
        # A single chunk needs no wider sum; further ones add up in float32.
        part1, part2 = dpre.t() @ x[rows], dy[rows].t() @ act
        dw1 = part1 if dw1 is None else dw1.float().add_(part1)
        dw2 = part2 if dw2 is None else dw2.float().add_(part2)
    assert dw1 is not None
    assert dw2 is not None
    if db1 is not None:
        db1 = db1.sum(0).to(x.dtype)
    return dx, dw1.to(x.dtype), db1, dw2.to(x.dtype)
