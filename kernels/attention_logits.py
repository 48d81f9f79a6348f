"""The logits of attention: scale, softcap, bias, ALiBi and masks, in every pass from one place.

Order of the logits: ``q @ k.T * scale``, softcap, bias, ALiBi, masks. Kernels keep them in the
units of exp2. Where nothing but the scale and masks act on them they stay unscaled products until
the exponential, which takes the scale in its own multiply-add.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .attention_tiles import aligned

# ------------------------------------------------------------------------------------------------
# Constants
# ------------------------------------------------------------------------------------------------

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


class Scoring(NamedTuple):
    """What turns the products of one head's queries and keys into logits; None is off.

    Keys at or past `key_end` do not exist or are padding. Query i sees the keys from
    i + diagonal - window_left to i + diagonal + window_right; a causal mask is a right window of 0.
    `bias` and `padding` point to the part of the head, or of the batch entry.
    """

    scale_log2: Any
    softcap: Any
    bias: Any
    stride_bias_m: Any
    stride_bias_n: Any
    slope_log2: Any
    padding: Any
    stride_pad_s: Any
    seqlen_q: Any
    seqlen_k: Any
    key_end: Any
    diagonal: Any
    window_left: Any
    window_right: Any


# ------------------------------------------------------------------------------------------------
# Device helpers
# ------------------------------------------------------------------------------------------------


# Triton 3.6 lets a function return None, but nothing that holds one: kernels put these three into
# a `Scoring` themselves.


@triton.jit
def head_bias(bias_ptr, batch, head, stride_b, stride_h, BIAS_ALIGN: tl.constexpr):
    """Return the pointer to the bias of one head, or None; by 64-bit offsets: it may be large."""
    bias = None
    if bias_ptr is not None:
        offset = batch.to(tl.int64) * aligned(stride_b, BIAS_ALIGN)
        bias = bias_ptr + (offset + head.to(tl.int64) * aligned(stride_h, BIAS_ALIGN))
    return bias


@triton.jit
def head_slope(slopes_ptr, head):
    """Return the ALiBi slope of one head in the units of exp2, or None."""
    slope_log2 = None
    if slopes_ptr is not None:
        slope_log2 = tl.load(slopes_ptr + head).to(tl.float32) * LOG2E
    return slope_log2


@triton.jit
def batch_padding(padding_ptr, batch, stride_b):
    """Return the pointer to the padding mask of one batch entry, or None; by 64-bit offsets."""
    padding = None
    if padding_ptr is not None:
        padding = padding_ptr + batch.to(tl.int64) * stride_b
    return padding


@triton.jit
def key_ranges(
    row, scoring, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EDGE_N: tl.constexpr
):  # fmt: skip
    """Return the key blocks that a query block visits: (begin, head_end, full, full_end, end).

    Blocks from `full` to `full_end` hide nothing. Those from `begin` to `head_end`, and from
    `full_end` to `end`, hide some keys; no other is visited. A padding mask may touch any block:
    none counts as full then.
    """
    begin = tl.full((), 0, tl.int32)
    full = begin
    end = scoring.key_end
    full_end = end
    last_row = tl.minimum(row + BLOCK_M, scoring.seqlen_q) - 1
    if scoring.window_right is not None:
        end = tl.minimum(end, last_row + scoring.diagonal + scoring.window_right + 1)
        full_end = tl.minimum(full_end, row + scoring.diagonal + scoring.window_right + 1)
        full_end = tl.maximum(full_end, 0)
    full_end = full_end // BLOCK_N * BLOCK_N
    head_end = begin
    if scoring.window_left is not None:
        begin = tl.maximum(row + scoring.diagonal - scoring.window_left, 0) // EDGE_N * EDGE_N
        full = tl.maximum(last_row + scoring.diagonal - scoring.window_left, 0)
        full = tl.cdiv(full, BLOCK_N) * BLOCK_N
        full_end = tl.maximum(full, full_end)
        head_end = begin + tl.cdiv(tl.maximum(tl.minimum(full, end) - begin, 0), EDGE_N) * EDGE_N
    if scoring.padding is not None:
        head_end, full, full_end = begin, begin, begin
    return begin, head_end, full, full_end, end


@triton.jit
def query_ranges(
    first_key, scoring, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, EDGE_M: tl.constexpr
):  # fmt: skip
    """Return the query blocks that a key block visits: (begin, head_end, full, full_end, end).

    As `key_ranges`, for rows. Keys that are all padding visit none; a padding mask hides no more
    than rows of dk and dv, which are zeroed at the end.
    """
    begin = tl.full((), 0, tl.int32)
    full = begin
    end = tl.where(first_key < scoring.key_end, scoring.seqlen_q, 0)
    full_end = end
    if scoring.window_right is not None:
        first_row = first_key - scoring.diagonal - scoring.window_right
        begin = tl.maximum(first_row, 0) // EDGE_M * EDGE_M
        full = tl.cdiv(tl.maximum(first_row + BLOCK_N - 1, 0), EDGE_M) * EDGE_M
    if scoring.window_left is not None:
        row_end = first_key - scoring.diagonal + scoring.window_left + 1
        full_end = tl.minimum(full_end, row_end)
        end = tl.minimum(end, row_end + BLOCK_N - 1)
    full_end = full + tl.maximum(full_end - full, 0) // BLOCK_M * BLOCK_M
    head_end = begin + tl.cdiv(tl.maximum(tl.minimum(full, end) - begin, 0), EDGE_M) * EDGE_M
    return begin, head_end, full, full_end, end


@triton.jit
def walk(begin, head_end, tail, end, MASKED: tl.constexpr, HAS_HEAD: tl.constexpr):
    """Return (first, last, gap) of a loop over the blocks of a pass.

    If MASKED, those are the blocks from `begin` to `head_end`, where HAS_HEAD says that there may
    be any, and from `tail` to `end`; else those from `begin` to `end`. The loop counts through both
    parts as if they were one; `walked` gives the position that a place in it stands for.
    """
    gap = 0
    if MASKED and HAS_HEAD:
        gap = tail - head_end
        end = head_end + tl.maximum(end - tail, 0)
    elif MASKED:
        # For the compiler another value than the end of the loop before it: where both are one, it
        # splits the way around that loop, and ptxas serialises its wgmma (C7515).
        begin = tl.maximum(tail, 0)
    return begin, end, gap


@triton.jit
def walked(place, head_end, gap, MASKED: tl.constexpr, HAS_HEAD: tl.constexpr):
    """Return the position of `place` in a `walk`."""
    position = place
    if MASKED and HAS_HEAD:
        position = tl.where(place < head_end, place, place + gap)
    return position


@triton.jit
def visible(
    row, column, scoring, AXIS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Return which keys the queries of a tile see; keys lie along AXIS.

    Positions count from the tile's corner: what each row may see is shifted once instead of what
    each element stands for.
    """
    places = tl.expand_dims(tl.arange(0, BLOCK_N), 1 - AXIS)
    ends = tl.zeros((BLOCK_M,), tl.int32) + (scoring.key_end - column)  # (BLOCK_M,)
    rows = row + tl.arange(0, BLOCK_M)  # (BLOCK_M,)
    if scoring.window_right is not None:
        shift = scoring.diagonal + scoring.window_right + 1 - column
        ends = tl.minimum(ends, rows + shift)  # (BLOCK_M,)
    seen = places < tl.expand_dims(ends, AXIS)
    if scoring.window_left is not None:
        starts = rows + (scoring.diagonal - scoring.window_left - column)  # (BLOCK_M,)
        seen = seen & (places >= tl.expand_dims(starts, AXIS))
    if scoring.padding is not None:
        columns = column + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
        pads = tl.load(
            scoring.padding + columns * scoring.stride_pad_s,
            mask=columns < scoring.seqlen_k,
            other=1,
        )
        seen = seen & tl.expand_dims(pads == 0, 1 - AXIS)
    return seen


@triton.jit
def acts_on_logits(scoring) -> tl.constexpr:
    """Return whether more than the scale and masks makes the logits."""
    return scoring.softcap is not None or scoring.bias is not None or scoring.slope_log2 is not None


@triton.jit
def first_products(
    row, column, scoring, AXIS: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Return what the products of a tile are added to: 0, and -inf where a key is hidden.

    Selecting after the product makes ptxas finish one column of it at a time, each an unbroken
    chain of dependent instructions: that doubled the cycles of an edge block at head dim 128.
    """
    start = tl.zeros((BLOCK_M, BLOCK_N) if AXIS == 1 else (BLOCK_N, BLOCK_M), tl.float32)
    if MASKED and not acts_on_logits(scoring):
        seen = visible(row, column, scoring, AXIS, BLOCK_M, BLOCK_N)
        start = tl.where(seen, start, -float("inf"))
    return start


@triton.jit
def finished_logits(
    products, row, column, scoring, AXIS: tl.constexpr, MASKED: tl.constexpr,
    ROWS_EXIST: tl.constexpr, KEYS_EXIST: tl.constexpr,
):  # fmt: skip
    """Return the logits of a tile of products, the factor they lack, and the softcap's derivative.

    `products` began as `first_products`. The tile begins at query `row` and key `column`, keys lie
    along AXIS. Logits times the factor are in the units of exp2. The derivative is that of the
    capped logits by the scaled products, 1.0 where there is no softcap. ROWS_EXIST and KEYS_EXIST
    promise that the tile lies inside of the sequences.
    """
    local_rows = tl.arange(0, products.shape[1 - AXIS])  # (BLOCK_M,)
    local_columns = tl.arange(0, products.shape[AXIS])  # (BLOCK_N,)
    rows, columns = row + local_rows, column + local_columns
    logits = products
    factor = scoring.scale_log2
    derivative = 1.0
    if scoring.softcap is not None:
        # tanh by an exponential, bounded where tanh is 1. As 1 - 2 / (grown + 1) it would need no
        # bound, but round three times as much.
        doubled = products * (2.0 * scoring.scale_log2 / scoring.softcap)
        grown = tl.exp2(tl.minimum(doubled, 64.0))
        bounded = (grown - 1.0) / (grown + 1.0)
        derivative = 1.0 - bounded * bounded
        logits = bounded * (scoring.softcap * LOG2E)
        factor = 1.0
    elif scoring.bias is not None or scoring.slope_log2 is not None:
        logits = products * factor
        factor = 1.0
    if scoring.bias is not None:
        base = tl.cast(row, tl.int64) * scoring.stride_bias_m
        base += tl.cast(column, tl.int64) * scoring.stride_bias_n
        row_offsets = tl.expand_dims(local_rows * scoring.stride_bias_m, AXIS)
        key_offsets = tl.expand_dims(local_columns * scoring.stride_bias_n, 1 - AXIS)
        bias_ptrs = scoring.bias + base + (row_offsets + key_offsets)
        real_row = tl.expand_dims(rows < scoring.seqlen_q, AXIS)
        real_key = tl.expand_dims(columns < scoring.seqlen_k, 1 - AXIS)
        if ROWS_EXIST and KEYS_EXIST:
            bias = tl.load(bias_ptrs)
        elif KEYS_EXIST:
            bias = tl.load(bias_ptrs, mask=real_row, other=0.0)
        elif ROWS_EXIST:
            bias = tl.load(bias_ptrs, mask=real_key, other=0.0)
        else:
            bias = tl.load(bias_ptrs, mask=real_row & real_key, other=0.0)
        logits += bias.to(tl.float32) * LOG2E
    if scoring.slope_log2 is not None:
        places = tl.expand_dims(rows + scoring.diagonal, AXIS)
        distance = tl.abs(places - tl.expand_dims(columns, 1 - AXIS)).to(tl.float32)
        logits -= scoring.slope_log2 * distance
    if MASKED and acts_on_logits(scoring):
        seen = visible(row, column, scoring, AXIS, products.shape[1 - AXIS], products.shape[AXIS])
        logits = tl.where(seen, logits, -float("inf"))
    return logits, factor, derivative
