"""Feed-forward blocks in Triton, few rows: plain and gated, for up to 16 tokens in 16-bit dtypes.

With so few tokens the time is that of reading the weights, each of which is read once. A program of
the first kernel owns a block of hidden units; one of the second a block of outputs and a part of
the hidden dimension, so that both fill the GPU. Partial outputs add up in a third, in a fixed
order. One kernel for both products would have to write a partial output for each block of hidden
units: with 16 tokens half as many bytes as the weights have.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import activate
from .common import dropout_keep, launch

# ------------------------------------------------------------------------------------------------
# Configs
# ------------------------------------------------------------------------------------------------

# The rows of one tensor-core tile: the kernels take no more tokens, and no fewer cost less.
MAX_TOKENS = 16

# Narrow blocks make enough programs to draw on the whole memory bandwidth; rows of 256 bytes and
# four stages keep enough loads in flight for each.
_BLOCK_N, _BLOCK_K, _NUM_WARPS, _NUM_STAGES = 32, 128, 4, 4

# Programs that the second kernel should have, on the largest GPUs two for a multiprocessor.
_PROGRAMS = 256

_REDUCTION_BLOCK = 256


def few_tokens(x: Tensor) -> bool:
    """Return whether this regime serves `x` (T, width)."""
    return x.dtype.itemsize == 2 and x.shape[0] <= MAX_TOKENS


def _splits(hidden: int, out_width: int) -> int:
    """Return into how many parts the hidden dimension is split, by the weights' shape alone."""
    wanted = triton.cdiv(_PROGRAMS, triton.cdiv(out_width, _BLOCK_N))
    return max(1, min(wanted, hidden // (4 * _BLOCK_K)))


# ------------------------------------------------------------------------------------------------
# Kernels
# ------------------------------------------------------------------------------------------------


@triton.jit
def _rows_times_weights(
    x_ptr, w_ptr, rows, tokens, first, last,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BOUND_K: tl.constexpr,
):  # fmt: skip
    """Return ``x @ w.T`` over the columns from `first` to `last` of K, float32.

    `x_ptr` begins at x (tokens, K), `w_ptr` at the block's rows of w, of which `rows` are left.
    """
    # Rows past either end repeat the last one and are not stored: fewer masks in the loop.
    x_rows = tl.minimum(tl.arange(0, BLOCK_M), tokens - 1)[:, None]  # (BLOCK_M, 1)
    w_rows = tl.minimum(tl.arange(0, BLOCK_N), rows - 1)[:, None]  # (BLOCK_N, 1)
    columns = tl.arange(0, BLOCK_K)[None, :]  # (1, BLOCK_K)
    x_offsets = x_rows * K + columns  # (BLOCK_M, BLOCK_K)
    w_offsets = w_rows * K + columns  # (BLOCK_N, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(first, last, BLOCK_K):
        if BOUND_K:
            x = tl.load(x_ptr + start + x_offsets, mask=columns < K - start, other=0.0)
            w = tl.load(w_ptr + start + w_offsets, mask=columns < K - start, other=0.0)
        else:
            x = tl.load(x_ptr + start + x_offsets)  # (BLOCK_M, BLOCK_K)
            w = tl.load(w_ptr + start + w_offsets)  # (BLOCK_N, BLOCK_K)
        acc = tl.dot(x, tl.trans(w), acc)
    return acc  # (BLOCK_M, BLOCK_N)


@triton.jit(do_not_specialize=["tokens", "width", "threshold"])
def decode_hidden_kernel(
    x_ptr, w1_ptr, b1_ptr, w_up_ptr, pre_ptr, up_ptr, hidden_ptr, seed_ptr,
    tokens, width, threshold, dropout_scale,
    WIDTH: tl.constexpr, HIDDEN: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute one block of hidden units for all tokens, gated where there is a `w_up_ptr`.

    Grid: (hidden blocks,). All tensors are contiguous: x (tokens, WIDTH), weights (HIDDEN, WIDTH),
    hidden (tokens, HIDDEN). `pre_ptr` and `up_ptr`, unless None, receive the first products.
    `width` is WIDTH again: a loop of known length would be unrolled whole.
    """
    unit = tl.program_id(0) * BLOCK_N
    weights = unit.to(tl.int64) * WIDTH
    left = HIDDEN - unit
    pre = _rows_times_weights(
        x_ptr, w1_ptr + weights, left, tokens, 0, width,
        WIDTH, BLOCK_M, BLOCK_N, BLOCK_K, WIDTH % BLOCK_K != 0,
    )  # (BLOCK_M, BLOCK_N)  # fmt: skip
    rows = tl.arange(0, BLOCK_M)[:, None]  # (BLOCK_M, 1)
    units = unit + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    if b1_ptr is not None:
        pre += tl.load(b1_ptr + units, mask=units < HIDDEN, other=0.0).to(tl.float32)[None, :]
    offsets = rows * HIDDEN + units[None, :]  # (BLOCK_M, BLOCK_N)
    inside = (rows < tokens) & (units < HIDDEN)[None, :]
    if pre_ptr is not None:
        tl.store(pre_ptr + offsets, pre.to(pre_ptr.dtype.element_ty), mask=inside)
    act, _ = activate(pre, ACTIVATION)  # (BLOCK_M, BLOCK_N)
    if w_up_ptr is not None:
        up = _rows_times_weights(
            x_ptr, w_up_ptr + weights, left, tokens, 0, width,
            WIDTH, BLOCK_M, BLOCK_N, BLOCK_K, WIDTH % BLOCK_K != 0,
        )  # (BLOCK_M, BLOCK_N)  # fmt: skip
        if up_ptr is not None:
            tl.store(up_ptr + offsets, up.to(up_ptr.dtype.element_ty), mask=inside)
        act *= up
    if seed_ptr is not None:
        keep = dropout_keep(
            tl.load(seed_ptr), 0, 0, 0, unit, threshold, BLOCK_M, BLOCK_N
        )  # (BLOCK_M, BLOCK_N)
        act = tl.where(keep, act * dropout_scale, 0.0)
    tl.store(hidden_ptr + offsets, act.to(hidden_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def decode_output_kernel(
    hidden_ptr, w2_ptr, partial_ptr, tokens,
    HIDDEN: tl.constexpr, OUT: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute one block of outputs for all tokens over one part of the hidden dimension.

    Grid: (output blocks, splits). hidden is (tokens, HIDDEN), w2 (OUT, HIDDEN), partial (splits,
    tokens, OUT) float32; a part has SPLIT units, a multiple of BLOCK_K, the last one maybe fewer.
    """
    column = tl.program_id(0) * BLOCK_N
    part = tl.program_id(1)
    first = part * SPLIT
    acc = _rows_times_weights(
        hidden_ptr, w2_ptr + column.to(tl.int64) * HIDDEN, OUT - column, tokens,
        first, tl.minimum(first + SPLIT, HIDDEN),
        HIDDEN, BLOCK_M, BLOCK_N, BLOCK_K, HIDDEN % BLOCK_K != 0,
    )  # (BLOCK_M, BLOCK_N)  # fmt: skip
    rows = tl.arange(0, BLOCK_M)[:, None]  # (BLOCK_M, 1)
    columns = column + tl.arange(0, BLOCK_N)[None, :]  # (1, BLOCK_N)
    offsets = (part * tokens + rows).to(tl.int64) * OUT + columns  # (BLOCK_M, BLOCK_N)
    tl.store(partial_ptr + offsets, acc, mask=(rows < tokens) & (columns < OUT))


@triton.jit(do_not_specialize=["tokens"])
def decode_sum_kernel(
    partial_ptr, b2_ptr, y_ptr, tokens,
    OUT: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum the partial outputs (SPLITS, tokens, OUT) of a token and add b2.

    Grid: (tokens, output blocks). y is (tokens, OUT) contiguous.
    """
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
    inside = columns < OUT
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(SPLITS):
        offset = (part * tokens + row).to(tl.int64) * OUT
        total += tl.load(partial_ptr + offset + columns, mask=inside, other=0.0)
    if b2_ptr is not None:
        total += tl.load(b2_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    y_ptr += row.to(tl.int64) * OUT
    tl.store(y_ptr + columns, total.to(y_ptr.dtype.element_ty), mask=inside)


# ------------------------------------------------------------------------------------------------
# Launchers
# ------------------------------------------------------------------------------------------------


def decode_forward(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w_up: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str,
    dropout: dict[str, object],
    saved: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the output (T, out), and where `saved` the first products (T, hidden), else None.

    All tensors are contiguous; the third result is None without a `w_up`. ReLU without gate and
    dropout has its activation for a first product, as in the epilogue regime.
    """
    (tokens, width), hidden, out = x.shape, w1.shape[0], w2.shape[0]
    act = x.new_empty(tokens, hidden)
    keeps_act = activation == "relu" and w_up is None and dropout["seed_ptr"] is None
    pre = torch.empty_like(act) if saved and not keeps_act else None
    up = torch.empty_like(act) if saved and w_up is not None else None
    tiles = {"BLOCK_M": MAX_TOKENS, "BLOCK_N": _BLOCK_N, "BLOCK_K": _BLOCK_K, "tokens": tokens}
    arguments = {
        "x_ptr": x,
        "w1_ptr": w1,
        "b1_ptr": b1,
        "w_up_ptr": w_up,
        "pre_ptr": pre,
        "up_ptr": up,
        "hidden_ptr": act,
        "width": width,
        "WIDTH": width,
        "HIDDEN": hidden,
        "ACTIVATION": activation,
        **tiles,
        **dropout,
    }
    options = {"num_warps": _NUM_WARPS, "num_stages": _NUM_STAGES}
    blocks = triton.cdiv(hidden, _BLOCK_N) if tokens else 0
    launch(decode_hidden_kernel, (blocks,), arguments, **options)
    splits = _splits(hidden, out)
    split = max(1, triton.cdiv(triton.cdiv(hidden, splits), _BLOCK_K)) * _BLOCK_K
    splits = triton.cdiv(hidden, split)
    partial = x.new_empty(splits, tokens, out, dtype=torch.float32)
    arguments = {
        "hidden_ptr": act,
        "w2_ptr": w2,
        "partial_ptr": partial,
        "HIDDEN": hidden,
        "OUT": out,
        "SPLIT": split,
        **tiles,
    }
    blocks = triton.cdiv(out, _BLOCK_N) if tokens else 0
    launch(decode_output_kernel, (blocks, splits), arguments, **options)
    y = x.new_empty(tokens, out)
    arguments = {
        "partial_ptr": partial,
        "b2_ptr": b2,
        "y_ptr": y,
        "tokens": tokens,
        "OUT": out,
        "SPLITS": splits,
        "BLOCK": _REDUCTION_BLOCK,
    }
    grid = (tokens, triton.cdiv(out, _REDUCTION_BLOCK))
    launch(decode_sum_kernel, grid, arguments, num_warps=4, num_stages=1)
    return y, act if saved and keeps_act else pre, up
