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
from .common import dropout_keep
from .feed_forward_tiles import (
    Config,
    ResidentConfigs,
    launch_resident,
    load_block,
    load_tokens,
    run_resident,
    store_block,
)

# ------------------------------------------------------------------------------------------------
# Configs
# ------------------------------------------------------------------------------------------------

# Under this many programs most of a large GPU idles while each walks the whole hidden dimension.
_MIN_PROGRAMS = 64

# Hidden gradients and activations that backward materialises at once.
_CHUNK_BYTES = 1 << 28

# By the padded width; all compile without spills. On sm_80 the tile of tokens is as large as the
# registers of four warps hold beside the output (128 of them a thread): eight warps, which share
# blocks of weights among narrower tiles, would compute a hidden tile of 32 columns twice.
_FORWARD_CONFIGS: dict[int, Config] = {
    32: (128, 64, 4, 3),
    64: (64, 64, 4, 3),
    128: (128, 32, 4, 2),
    256: (64, 32, 4, 2),
}
_BACKWARD_CONFIGS: dict[int, Config] = {
    32: (64, 64, 4, 2),
    64: (64, 32, 4, 2),
    128: (64, 64, 4, 2),
    256: (64, 32, 4, 2),
}

# With dropout, whose random words take registers too.
_DROPPING_CONFIGS: dict[int, Config] = {128: (64, 64, 8, 2), 256: (64, 32, 8, 2)}

# What differs from the tables above in a family: wgmma and tcgen05 want two warpgroups; sm_86 has
# too little shared memory, and its code takes more registers.
_FORWARD_EXCEPTIONS: dict[str, dict[int, Config]] = {
    "sm_86": {128: (128, 64, 8, 2)},
    "sm_90": {128: (128, 64, 8, 2), 256: (128, 32, 8, 2)},
    "sm_100": {128: (128, 64, 8, 2), 256: (128, 32, 8, 2)},
}
_BACKWARD_EXCEPTIONS: dict[str, dict[int, Config]] = {
    "sm_86": {32: (64, 32, 4, 2), 128: (64, 64, 8, 2), 256: (32, 32, 8, 2)},
    "sm_90": {128: (64, 32, 8, 2), 256: (32, 32, 8, 2)},
    "sm_100": {128: (64, 32, 8, 2), 256: (64, 32, 8, 2)},
    "gfx942": {128: (64, 32, 4, 2), 256: (32, 32, 4, 2)},
}

_CONFIGS = ResidentConfigs(
    _FORWARD_CONFIGS,
    _BACKWARD_CONFIGS,
    _DROPPING_CONFIGS,
    _FORWARD_EXCEPTIONS,
    _BACKWARD_EXCEPTIONS,
)


# ------------------------------------------------------------------------------------------------
# Device helpers
# ------------------------------------------------------------------------------------------------


@triton.jit
def _hidden_blocks(
    x, w1_ptr, b1_ptr, w2_ptr, start,
    WIDTH: tl.constexpr, HIDDEN: tl.constexpr, OUT: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Return the pre-activation of the hidden units from `start` on, and their weight blocks."""
    RAGGED: tl.constexpr = HIDDEN % BLOCK_H != 0
    left = HIDDEN - start
    w1 = load_block(
        w1_ptr + start * WIDTH, WIDTH, left, WIDTH, BLOCK_H, BLOCK_W, RAGGED, WIDTH != BLOCK_W
    )  # (BLOCK_H, BLOCK_W)
    w2 = load_block(
        w2_ptr + start, HIDDEN, OUT, left, BLOCK_O, BLOCK_H, OUT != BLOCK_O, RAGGED
    )  # (BLOCK_O, BLOCK_H)
    units = tl.arange(0, BLOCK_H)  # (BLOCK_H,)
    b1 = 0.0
    if b1_ptr is not None:
        if RAGGED:
            b1 = tl.load(b1_ptr + start + units, mask=units < left, other=0.0)  # (BLOCK_H,)
        else:
            b1 = tl.load(b1_ptr + start + units)  # (BLOCK_H,)
    pre = tl.dot(x, tl.trans(w1))  # (BLOCK_M, BLOCK_H)
    if b1_ptr is not None:
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
    x = load_tokens(x_ptr + row.to(tl.int64) * WIDTH, tokens - row, WIDTH, BLOCK_M, BLOCK_W)
    seed = 0
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    acc = tl.zeros((BLOCK_M, BLOCK_O), tl.float32)
    if b2_ptr is not None:
        # Before the loop: what the addition needs would hold registers throughout it.
        columns = tl.arange(0, BLOCK_O)  # (BLOCK_O,)
        if OUT != BLOCK_O:
            b2 = tl.load(b2_ptr + columns, mask=columns < OUT, other=0.0)  # (BLOCK_O,)
        else:
            b2 = tl.load(b2_ptr + columns)  # (BLOCK_O,)
        acc += b2.to(tl.float32)[None, :]
    for start in range(0, HIDDEN, BLOCK_H):
        pre, _, w2 = _hidden_blocks(
            x, w1_ptr, b1_ptr, w2_ptr, start, WIDTH, HIDDEN, OUT, BLOCK_W, BLOCK_O, BLOCK_H
        )
        act, _ = activate(pre, ACTIVATION)  # (BLOCK_M, BLOCK_H)
        if seed_ptr is not None:
            keep = dropout_keep(seed, 0, 0, row, start, threshold, BLOCK_M, BLOCK_H)
            act = tl.where(keep, act * dropout_scale, 0.0)
        acc = tl.dot(act.to(w2.dtype), tl.trans(w2), acc)
    y_ptr += row.to(tl.int64) * OUT
    store_block(y_ptr, acc, OUT, tokens - row, OUT, OUT != BLOCK_O)


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
    x = load_tokens(x_ptr + block * BLOCK_M * WIDTH, left, WIDTH, BLOCK_M, BLOCK_W)
    # The rows past the end must add nothing to db1. Masked here they cost nothing in the loop, but
    # the widest tile then runs out of registers, and masks them there.
    MASKED: tl.constexpr = BLOCK_O <= 128
    dy_ptr += block * BLOCK_M * OUT
    if MASKED:
        dy = load_block(dy_ptr, OUT, left, OUT, BLOCK_M, BLOCK_O, True, OUT != BLOCK_O)
    else:
        dy = load_tokens(dy_ptr, left, OUT, BLOCK_M, BLOCK_O)  # (BLOCK_M, BLOCK_O)
    dpre_ptr += block * BLOCK_M * HIDDEN
    act_ptr += block * BLOCK_M * HIDDEN
    seed = 0
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    RAGGED: tl.constexpr = HIDDEN % BLOCK_H != 0
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
            summands = dpre  # (BLOCK_M, BLOCK_H)
            if not MASKED:
                summands = tl.where(tl.arange(0, BLOCK_M)[:, None] < left, dpre, 0.0)
            units = tl.arange(0, BLOCK_H)  # (BLOCK_H,)
            db1_ptrs = db1_ptr + block * HIDDEN + start + units  # (BLOCK_H,)
            if RAGGED:
                tl.store(db1_ptrs, tl.sum(summands, 0), mask=units < HIDDEN - start)
            else:
                tl.store(db1_ptrs, tl.sum(summands, 0))
        narrow = dpre.to(w1.dtype)  # (BLOCK_M, BLOCK_H)
        store_block(act_ptr + start, act, HIDDEN, left, HIDDEN - start, RAGGED)
        store_block(dpre_ptr + start, narrow, HIDDEN, left, HIDDEN - start, RAGGED)
        acc = tl.dot(narrow, w1, acc)
    dx_ptr += block * BLOCK_M * WIDTH
    store_block(dx_ptr, acc, WIDTH, left, WIDTH, WIDTH != BLOCK_W)


# ------------------------------------------------------------------------------------------------
# Launchers
# ------------------------------------------------------------------------------------------------


def enough_tokens(x: Tensor, out_width: int) -> bool:
    """Return whether the blocks of tokens of `x` (T, width) occupy a GPU in this regime."""
    return x.shape[0] >= _MIN_PROGRAMS * _CONFIGS.of_forward(x, out_width)[0]


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
    hidden, out = w1.shape[0], w2.shape[0]
    arguments = {
        "w1_ptr": w1,
        "b1_ptr": b1,
        "w2_ptr": w2,
        "b2_ptr": b2,
        "y_ptr": y,
        "ACTIVATION": activation,
        **dropout,
    }
    kernel = feed_forward_resident_kernel
    run_resident(
        kernel,
        _CONFIGS.of_forward(x, out),
        {**arguments, "WIDTH": x.shape[1], "HIDDEN": hidden, "OUT": out},
        (x.shape[0],),
        lambda config: launch_resident(kernel, config, x, hidden, out, arguments),
    )
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
    return run_resident(
        feed_forward_resident_gradient_kernel,
        _CONFIGS.of_backward(x, w2.shape[0], dropout["seed_ptr"] is not None),
        {
            "x_ptr": x,
            "b1_ptr": b1,
            "WIDTH": x.shape[1],
            "HIDDEN": w1.shape[0],
            "OUT": w2.shape[0],
            "ACTIVATION": activation,
            **dropout,
        },
        (x.shape[0],),
        lambda config: _gradients(config, dy, x, w1, b1, w2, activation, dropout),
    )


def _gradients(
    config: Config,
    dy: Tensor,
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    activation: str,
    dropout: dict[str, object],
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Return what `resident_backward` does, with the given config."""
    tokens, hidden = x.shape[0], w1.shape[0]
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
            "w1_ptr": w1,
            "b1_ptr": b1,
            "w2_ptr": w2,
            "dx_ptr": dx[rows],
            "dpre_ptr": dpre,
            "act_ptr": act,
            "db1_ptr": None if db1 is None else db1[start // block_m :],
            "first_row": start,
            "ACTIVATION": activation,
            **dropout,
        }
        kernel = feed_forward_resident_gradient_kernel
        launch_resident(kernel, config, x[rows], hidden, w2.shape[0], arguments)
        # A single chunk needs no wider sum; further ones add up in float32.
        part1, part2 = dpre.t() @ x[rows], dy[rows].t() @ act
        dw1 = part1 if dw1 is None else dw1.float().add_(part1)
        dw2 = part2 if dw2 is None else dw2.float().add_(part2)
    assert dw1 is not None
    assert dw2 is not None
    if db1 is not None:
        db1 = db1.sum(0).to(x.dtype)
    return dx, dw1.to(x.dtype), db1, dw2.to(x.dtype)
