"""Tiles of the tensors that attention reads and writes: where they begin, loading, storing."""

import triton
import triton.language as tl

# ------------------------------------------------------------------------------------------------
# Constants
# ------------------------------------------------------------------------------------------------

#: Integers that change from call to call: specialising on them would only add compilations. Strides
#: of batch entries and heads change with the lengths, and so does that of a bias's rows; kernels
#: know their alignment by `aligned`.
RUNTIME_SIZES = (
    *("heads", "seqlen_q", "seqlen_k", "window_left", "window_right", "threshold", "pages"),
    "stride_bias_m",
    *(
        f"stride_{name}{axis}"
        for name in ("q", "k", "v", "o", "do", "dq", "dk", "dv", "l", "bias_", "pad_")
        for axis in "bh"
    ),
)


# ------------------------------------------------------------------------------------------------
# Device helpers
# ------------------------------------------------------------------------------------------------


@triton.jit
def sequence_bounds(
    batch, cu_seqlens_q, cu_seqlens_k, key_lengths, seqlen_q, seqlen_k, BOTTOM_RIGHT: tl.constexpr
):
    """Return a sequence's first rows in q and k, its query number, its key end, its diagonal.

    Dense tensors start at row 0 of their batch entry. Keys at or past the end do not exist or are
    padding; with a causal mask query i sees the keys up to i + diagonal. If BOTTOM_RIGHT, the last
    query is aligned with the last key before the end.
    """
    start_q = tl.full((), 0, tl.int32)
    start_k = tl.full((), 0, tl.int32)
    if cu_seqlens_q is not None:
        start_q = tl.load(cu_seqlens_q + batch)
        start_k = tl.load(cu_seqlens_k + batch)
        seqlen_q = tl.load(cu_seqlens_q + batch + 1) - start_q
        seqlen_k = tl.load(cu_seqlens_k + batch + 1) - start_k
    key_end = seqlen_k
    if key_lengths is not None:
        key_end = tl.maximum(tl.minimum(tl.load(key_lengths + batch), seqlen_k), 0)
    diagonal = tl.full((), 0, tl.int32)
    if BOTTOM_RIGHT:
        diagonal = key_end - seqlen_q
    return start_q, start_k, seqlen_q, seqlen_k, key_end, diagonal


@triton.jit
def aligned(stride, ALIGN: tl.constexpr):
    """Return `stride`, which ALIGN divides, in a form from which the compiler can tell that.

    By itself it only sees divisibility by 16, and head dims such as 40 or 72 would lose their
    16-byte loads. ALIGN is None where there is no tensor.
    """
    if ALIGN is not None:
        stride = stride // ALIGN * ALIGN
    return stride


@triton.jit
def head_base(ptr, batch, head, start, stride_b, stride_h, stride_s, ALIGN: tl.constexpr):
    """Return the pointer to row `start` of one head, by 64-bit offsets: tensors may be large."""
    offset = batch.to(tl.int64) * aligned(stride_b, ALIGN)
    offset += head.to(tl.int64) * aligned(stride_h, ALIGN)
    return ptr + (offset + start.to(tl.int64) * stride_s)


@triton.jit
def tile_offsets(stride_s, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return the offsets of a tile's elements from its first row, 32-bit and the same for all."""
    return tl.arange(0, BLOCK)[:, None] * stride_s + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def load_tile(base, offsets, row, stride_s, rows, HEAD_DIM: tl.constexpr, BOUNDED: tl.constexpr):
    """Load the tile that begins at `row`: 0 from row `rows` on, if BOUNDED, and past HEAD_DIM."""
    BLOCK: tl.constexpr = offsets.shape[0]
    BLOCK_D: tl.constexpr = offsets.shape[1]
    ptrs = base + tl.cast(row, tl.int64) * stride_s + offsets  # (BLOCK, BLOCK_D)
    real_row = tl.arange(0, BLOCK)[:, None] < rows - row  # (BLOCK, 1)
    real_column = tl.arange(0, BLOCK_D)[None, :] < HEAD_DIM  # (1, BLOCK_D)
    if BOUNDED and HEAD_DIM != BLOCK_D:
        tile = tl.load(ptrs, mask=real_row & real_column, other=0.0)
    elif BOUNDED:
        tile = tl.load(ptrs, mask=real_row, other=0.0)
    elif HEAD_DIM != BLOCK_D:
        tile = tl.load(ptrs, mask=real_column, other=0.0)
    else:
        tile = tl.load(ptrs)
    return tile  # (BLOCK, BLOCK_D)


@triton.jit
def place_keys(
    table_ptr, batch, stride_tb, stride_ts, pages, start, end,
    PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Return where the keys from `start` on lie: batch entry or page, and row there.

    The first of them is a scalar where the keys share it. Without a table the batch entry is the
    sequence's own; a page that does not exist becomes one that does, as nothing checks the table.
    """
    keys = start + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    entry = batch
    slots = keys
    if table_ptr is not None:
        table_ptr += batch.to(tl.int64) * stride_tb
        if PAGE_SIZE % BLOCK_N == 0:
            entry = tl.load(table_ptr + start // PAGE_SIZE * stride_ts)
            slots = start % PAGE_SIZE + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
        else:
            entry = tl.load(table_ptr + keys // PAGE_SIZE * stride_ts, mask=keys < end, other=0)
            slots = keys % PAGE_SIZE  # (BLOCK_N,)
        entry = tl.maximum(tl.minimum(entry, pages - 1), 0)
    return entry, slots


@triton.jit
def load_rows(head_ptr, entry, slots, stride_b, stride_s, real, HEAD_DIM, BLOCK_D: tl.constexpr):
    """Load rows of a cache's head, by 64-bit offsets; 0 where not `real` and past HEAD_DIM.

    All rows are where `real` is None.
    """
    offsets = entry.to(tl.int64) * stride_b + slots.to(tl.int64) * stride_s  # (BLOCK_N,)
    columns = tl.arange(0, BLOCK_D)  # (BLOCK_D,)
    ptrs = head_ptr + offsets[:, None] + columns[None, :]  # (BLOCK_N, BLOCK_D)
    inside = (columns < HEAD_DIM)[None, :]
    if real is not None and HEAD_DIM != BLOCK_D:
        rows = tl.load(ptrs, mask=real[:, None] & inside, other=0.0)
    elif real is not None:
        rows = tl.load(ptrs, mask=real[:, None], other=0.0)
    elif HEAD_DIM != BLOCK_D:
        rows = tl.load(ptrs, mask=inside, other=0.0)
    else:
        rows = tl.load(ptrs)
    return rows  # (BLOCK_N, BLOCK_D)


@triton.jit
def store_tile(base, tile, row, stride_s, rows, HEAD_DIM: tl.constexpr):
    """Store `tile` (BLOCK, BLOCK_D) from `row` up to row `rows` and column HEAD_DIM."""
    BLOCK: tl.constexpr = tile.shape[0]
    BLOCK_D: tl.constexpr = tile.shape[1]
    ptrs = base + tl.cast(row, tl.int64) * stride_s + tile_offsets(stride_s, BLOCK, BLOCK_D)
    real_row = tl.arange(0, BLOCK)[:, None] < rows - row  # (BLOCK, 1)
    real_column = tl.arange(0, BLOCK_D)[None, :] < HEAD_DIM  # (1, BLOCK_D)
    tl.store(ptrs, tile.to(base.dtype.element_ty), mask=real_row & real_column)
