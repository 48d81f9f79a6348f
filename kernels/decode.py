"""Attention of new queries over a cache in Triton: of a few, keys split over programs, then merged.

Many are served by the forward kernel of attention, which the caches and their pages are handed to.

Source: Dao et al., "Flash-Decoding for long-context inference", 2023; Kwon et al., "Efficient
Memory Management for Large Language Model Serving with PagedAttention", 2023.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention import cached_attention_forward
from .attention_layout import Layout, is_far
from .attention_logits import LN2, LOG2E
from .attention_tiles import aligned, load_rows, place_keys
from .autotune import is_on, tuned
from .common import KernelSpec, dot_precision, launch, recorded_launches
from .decode_configs import MERGE, MOST_QUERIES, Tiles, candidates, choose_splits, decode_tiles

__all__ = ["decode_attention", "kernel_specs"]

# ------------------------------------------------------------------------------------------------
# Constants
# ------------------------------------------------------------------------------------------------

#: Integers that change from call to call: specialising on them would only add compilations. Strides
#: are among them since that of a head, say, is the capacity times the head dim.
_STRIDES = tuple(f"stride_{tensor}{dim}" for tensor in "qkvo" for dim in "bhs")
_SIZES = ("heads", "seqlen_q", "capacity", "pages", "splits", "window_left", "window_right")
RUNTIME_SIZES = (*_STRIDES, *_SIZES, "stride_tb", "stride_ts")


# ------------------------------------------------------------------------------------------------
# Device helpers
# ------------------------------------------------------------------------------------------------


@triton.jit
def split_ranges(
    lengths_ptr, batch, seqlen_q, capacity, splits, window_left, BLOCK_N: tl.constexpr
):
    """Return how a sequence is split: its length, the first key that it sees, a split's keys.

    The splits share the blocks of this sequence, not those that the cache has room for; the last
    ones may come away empty.
    """
    length = tl.load(lengths_ptr + batch)
    length = tl.maximum(tl.minimum(length, capacity), 0).to(tl.int32)
    begin = tl.full((), 0, tl.int32)
    if window_left is not None:
        begin = tl.maximum(length - seqlen_q - window_left, 0) // BLOCK_N * BLOCK_N
    blocks = tl.cdiv(length - begin, BLOCK_N)
    return length, begin, tl.cdiv(blocks, splits) * BLOCK_N


@triton.jit
def fold(row_max, row_sum, logits):
    """Return a running maximum and sum (R,) after `logits` (R, C), their weights, and the rescale.

    All are in the units of exp2. While nothing was seen any finite shift will do, as weights must
    be 0 and not NaN.
    """
    row_top = tl.maximum(row_max, tl.max(logits, 1))  # (R,)
    shift = tl.where(row_top == -float("inf"), 0.0, row_top)  # (R,)
    weights = tl.exp2(logits - shift[:, None])  # (R, C)
    rescale = tl.exp2(row_max - shift)  # (R,)
    return row_top, row_sum * rescale + tl.sum(weights, 1), weights, rescale


@triton.jit
def finish(row_max, row_sum, sinks):
    """Return the factor of the accumulator (R,) and the lse in the units of exp2.

    `sinks` (R,) are logits in the same units that join the sum alone, or None.
    """
    rescale = 1.0
    if sinks is not None:
        row_max, row_sum, _, rescale = fold(row_max, row_sum, sinks[:, None])
    empty = row_sum == 0  # (R,)
    row_sum = tl.where(empty, 1.0, row_sum)
    return rescale / row_sum, tl.where(empty, -float("inf"), row_max + tl.log2(row_sum))


# ------------------------------------------------------------------------------------------------
# Kernels
# ------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def decode_attention_kernel(
    q_ptr, stride_qb, stride_qh, stride_qs,
    k_ptr, stride_kb, stride_kh, stride_ks,
    v_ptr, stride_vb, stride_vh, stride_vs,
    out_ptr, stride_ob, stride_oh, stride_os, lse_ptr,
    partial_ptr, partial_lse_ptr,
    lengths_ptr, table_ptr, stride_tb, stride_ts, slopes_ptr, sinks_ptr,
    heads, seqlen_q, capacity, pages, splits, window_left, window_right, sm_scale, softcap,
    FUTURE: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    PAGE_SIZE: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Compute one split of the keys for the rows that share a key head: heads times queries.

    Rows see keys behind their own if FUTURE, up to `window_right` of them where it is not None.
    A single split writes the output and its lse. Several write partial ones, (B, H, Sq, splits, D)
    and (B, H, Sq, splits) in float32 and the units of exp2, each a softmax of its own.
    Grid: (row blocks * splits * key heads * batch,), those that share keys side by side.
    """
    rows = GROUP * seqlen_q
    blocks = tl.cdiv(rows, BLOCK_M)
    pid = tl.program_id(0)
    split = pid // blocks % splits
    group = pid // blocks // splits
    batch = group // (heads // GROUP)
    kv_head = group % (heads // GROUP)
    length, first, step = split_ranges(
        lengths_ptr, batch, seqlen_q, capacity, splits, window_left, BLOCK_N
    )
    begin = first + split * step
    end = tl.minimum(begin + step, length)
    if begin >= end and splits > 1:
        return  # the merge does not look for it

    row = pid % blocks * BLOCK_M + tl.arange(0, BLOCK_M)  # (BLOCK_M,)
    real = row < rows  # (BLOCK_M,)
    head = kv_head * GROUP + row // seqlen_q  # (BLOCK_M,)
    query = row % seqlen_q  # (BLOCK_M,)
    place = length - seqlen_q + query  # (BLOCK_M,) the key that a row is aligned with
    columns = tl.arange(0, BLOCK_D)  # (BLOCK_D,)
    q_ptr += batch.to(tl.int64) * aligned(stride_qb, ALIGN)
    q_head = q_ptr + head.to(tl.int64) * aligned(stride_qh, ALIGN)  # (BLOCK_M,)
    q_ptrs = (q_head + query * aligned(stride_qs, ALIGN))[:, None] + columns[None, :]
    inside = real[:, None] & (columns < HEAD_DIM)[None, :]  # (BLOCK_M, BLOCK_D)
    q = tl.load(q_ptrs, mask=inside, other=0.0)  # (BLOCK_M, BLOCK_D)
    if slopes_ptr is not None:
        slopes = tl.load(slopes_ptr + head, mask=real, other=0.0) * LOG2E  # (BLOCK_M,)

    k_head = k_ptr + kv_head.to(tl.int64) * aligned(stride_kh, ALIGN)
    v_head = v_ptr + kv_head.to(tl.int64) * aligned(stride_vh, ALIGN)
    stride_kb, stride_ks = aligned(stride_kb, ALIGN), aligned(stride_ks, ALIGN)
    stride_vb, stride_vs = aligned(stride_vb, ALIGN), aligned(stride_vs, ALIGN)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    row_max = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    for start in range(begin, end, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
        entry, slots = place_keys(
            table_ptr, batch, stride_tb, stride_ts, pages, start, end, PAGE_SIZE, BLOCK_N
        )
        k = load_rows(k_head, entry, slots, stride_kb, stride_ks, keys < end, HEAD_DIM, BLOCK_D)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # (BLOCK_M, BLOCK_N)
        if softcap is not None:
            # tanh by an exponential that saturates at both ends.
            grown = tl.exp2(logits * (2.0 * LOG2E * sm_scale / softcap))
            logits = (1.0 - 2.0 / (grown + 1.0)) * (softcap * LOG2E)
        else:
            logits *= sm_scale * LOG2E
        distance = place[:, None] - keys[None, :]  # (BLOCK_M, BLOCK_N), negative: the future
        if slopes_ptr is not None:
            logits -= slopes[:, None] * tl.abs(distance).to(tl.float32)
        if FUTURE:
            seen = (keys < end)[None, :]
        else:
            seen = distance >= 0
        if window_right is not None:
            seen = seen & (distance >= -window_right)
        if window_left is not None:
            seen = seen & (distance <= window_left)
        logits = tl.where(seen, logits, -float("inf"))
        row_max, row_sum, weights, rescale = fold(row_max, row_sum, logits)
        v = load_rows(v_head, entry, slots, stride_vb, stride_vs, keys < end, HEAD_DIM, BLOCK_D)
        acc = acc * rescale[:, None]
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=PRECISION)

    result = group.to(tl.int64) * rows + row  # (BLOCK_M,) of (B, H, Sq)
    if splits > 1:
        factor, lse = finish(row_max, row_sum, None)
        result = result * splits + split
        tl.store(partial_lse_ptr + result, lse, mask=real)
        ptrs = partial_ptr + (result * HEAD_DIM)[:, None] + columns[None, :]
        tl.store(ptrs, acc * factor[:, None], mask=inside)
    else:
        sinks = None
        if sinks_ptr is not None:
            sinks = tl.load(sinks_ptr + head, mask=real, other=0.0) * LOG2E  # (BLOCK_M,)
        factor, lse = finish(row_max, row_sum, sinks)
        tl.store(lse_ptr + result, lse * LN2, mask=real)
        out_ptr += batch.to(tl.int64) * aligned(stride_ob, ALIGN)
        out_head = out_ptr + head.to(tl.int64) * aligned(stride_oh, ALIGN)  # (BLOCK_M,)
        out_ptrs = (out_head + query * aligned(stride_os, ALIGN))[:, None] + columns[None, :]
        tl.store(out_ptrs, (acc * factor[:, None]).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def decode_merge_kernel(
    partial_ptr, partial_lse_ptr, out_ptr, stride_ob, stride_oh, stride_os, lse_ptr,
    lengths_ptr, sinks_ptr, heads, seqlen_q, capacity, splits, window_left,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr, BLOCK_N: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """Merge the partial results of one row by their lse, STEP at a time and always in one order.

    Grid: (batch * heads * queries,). BLOCK_N is that of `decode_attention_kernel`.
    """
    row = tl.program_id(0).to(tl.int64)
    batch = row // seqlen_q // heads
    head = row // seqlen_q % heads
    length, first, step = split_ranges(
        lengths_ptr, batch, seqlen_q, capacity, splits, window_left, BLOCK_N
    )
    live = tl.cdiv(length - first, tl.maximum(step, 1))
    columns = tl.arange(0, BLOCK_D)  # (BLOCK_D,)
    acc = tl.zeros((BLOCK_D,), tl.float32)
    row_sum = tl.zeros((1,), tl.float32)
    row_max = tl.full((1,), -float("inf"), tl.float32)
    for start in range(0, live, STEP):
        split = start + tl.arange(0, STEP)  # (STEP,)
        lse_ptrs = partial_lse_ptr + (row * splits + split)
        lse = tl.load(lse_ptrs, mask=split < live, other=-float("inf"))  # (STEP,)
        row_max, row_sum, weights, rescale = fold(row_max, row_sum, lse[None, :])
        ptrs = partial_ptr + ((row * splits + split) * HEAD_DIM)[:, None] + columns[None, :]
        mask = (split < live)[:, None] & (columns < HEAD_DIM)[None, :]
        partial = tl.load(ptrs, mask=mask, other=0.0)  # (STEP, BLOCK_D)
        acc = acc * rescale + tl.sum(tl.trans(weights) * partial, 0)
    sinks = None
    if sinks_ptr is not None:
        sinks = tl.load(sinks_ptr + head + tl.zeros((1,), tl.int32)) * LOG2E  # (1,)
    factor, lse = finish(row_max, row_sum, sinks)
    tl.store(lse_ptr + row + tl.zeros((1,), tl.int32), lse * LN2)
    out_ptr += batch * aligned(stride_ob, ALIGN) + head * aligned(stride_oh, ALIGN)
    out_ptr += row % seqlen_q * aligned(stride_os, ALIGN)
    tl.store(
        out_ptr + columns, (acc * factor).to(out_ptr.dtype.element_ty), mask=columns < HEAD_DIM
    )


# ------------------------------------------------------------------------------------------------
# Launchers
# ------------------------------------------------------------------------------------------------


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_lengths: Tensor,
    block_table: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    window_left: int,
    window_right: int,
    softcap: float,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return the output, like `q` (B, H, Sq, D), and lse (B, H, Sq) in float32.

    The caches are (B, Hkv, capacity, D), or (pages, Hkv, page_size, D) with a `block_table`
    (B, max_pages). The last query is aligned with the last of `cache_lengths` (B,) keys; a side of
    the window that is not -1 bounds how far from its own key a query sees, 0 to the right makes it
    causal.
    """
    if q.shape[2] > MOST_QUERIES and not (is_far(k_cache, 2) or is_far(v_cache, 2)):
        return cached_attention_forward(
            q, k_cache, v_cache, cache_lengths, block_table, alibi_slopes, sinks,
            window_left, window_right, softcap, scale,
        )  # fmt: skip
    layout = Layout.dense(q, k_cache)
    pages, kv_heads, page_size, _ = k_cache.shape
    capacity = page_size
    if block_table is not None:
        capacity *= block_table.shape[1] if pages else 0
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)

    rows, groups = layout.group * layout.seqlen_q, kv_heads * layout.batch
    visible = capacity if window_left < 0 else min(capacity, window_left + layout.seqlen_q)

    shared: dict[str, Any] = {
        "out_ptr": out,
        "lse_ptr": lse,
        "sinks_ptr": None if sinks is None else sinks.float().contiguous(),
        "heads": layout.heads,
        "seqlen_q": layout.seqlen_q,
        "capacity": capacity,
        "window_left": None if window_left < 0 else min(window_left, 2**30),
        "HEAD_DIM": layout.head_dim,
        "BLOCK_D": layout.block_d,
    }
    arguments = {
        **shared,
        **layout.strides(q=q, k=k_cache, v=v_cache, o=out),
        "q_ptr": q,
        "k_ptr": k_cache,
        "v_ptr": v_cache,
        "table_ptr": block_table,
        "stride_tb": 0 if block_table is None else block_table.stride(0),
        "stride_ts": 0 if block_table is None else block_table.stride(1),
        "slopes_ptr": None if alibi_slopes is None else alibi_slopes.float().contiguous(),
        "pages": pages,
        "sm_scale": scale,
        "softcap": softcap or None,
        "window_right": None if window_right <= 0 else min(window_right, 2**30),
        "FUTURE": window_right != 0,
        "GROUP": layout.group,
        "PAGE_SIZE": page_size if block_table is not None else 0,
        "PRECISION": dot_precision(layout.dtype),
    }

    # A search takes full caches: those of the first call hold next to nothing.
    full = torch.full_like(cache_lengths, capacity) if is_on() else cache_lengths

    def run(tiles: Tiles, lengths: Tensor = full) -> None:
        programs = triton.cdiv(rows, tiles.block_m) * groups
        splits = choose_splits(programs, visible, tiles.block_n, layout.family)
        parts = (*lse.shape, splits)
        split = {
            "partial_ptr": lse.new_empty(*parts, layout.head_dim) if splits > 1 else lse,
            "partial_lse_ptr": lse.new_empty(parts) if splits > 1 else lse,
            "lengths_ptr": lengths.contiguous(),
            "splits": splits,
            "BLOCK_N": tiles.block_n,
        }
        given = arguments | split | {"BLOCK_M": tiles.block_m}
        launch(decode_attention_kernel, (programs * splits,), given, **tiles.options)
        if splits > 1:
            given = shared | split | layout.strides(o=out) | {"STEP": MERGE.block_n}
            launch(decode_merge_kernel, (lse.numel(),), given, **MERGE.options)

    tiles = decode_tiles(layout.family, layout.block_d, layout.dtype, rows, block_table is not None)
    sizes = (groups, visible, rows)
    tiles = tuned(decode_attention_kernel, arguments, sizes, tiles, lambda: candidates(tiles), run)
    run(tiles, cache_lengths)
    return out, lse


# ------------------------------------------------------------------------------------------------
# Specs
# ------------------------------------------------------------------------------------------------


def kernel_specs(family: str) -> Iterator[KernelSpec]:
    """Yield the launches of representative calls with the configs of an architecture family.

    Every head dim class with one row and with as many as a tile takes, pages, masks and what acts
    on the logits spread over them.
    """
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    # head dim, query heads of a key head, queries, page size, options, the right side of the window
    cases = [(bf16, dim, 4, 1, 0, False, 0) for dim in (16, 32, 64, 128, 256)]
    cases += [(fp16, dim, 8, 8, 16, True, 0) for dim in (16, 24, 40, 80, 200)]
    cases += [(bf16, dim, 8, 8, 256, True, 0) for dim in (32, 64, 128, 256)]
    cases += [(bf16, dim, 8, 4, 16, False, 0) for dim in (64, 128, 256)]
    cases += [(fp32, dim, 4, 2, 16, True, 0) for dim in (16, 32, 64, 128, 256)]
    cases += [(bf16, dim, 8, 64, 16, True, 500) for dim in (16, 32, 64, 128, 256)]
    # by the forward kernel
    cases += [(bf16, dim, 4, 512, 16, False, 0) for dim in (16, 32, 64, 128, 256)]
    cases += [(fp16, dim, 4, 512, 16, True, 0) for dim in (40, 80, 200)]
    cases += [(bf16, dim, 4, 512, 256, True, 0) for dim in (64, 128, 256)]
    cases += [(fp32, dim, 4, 512, 16, True, 0) for dim in (16, 32, 64, 128, 256)]
    cases += [(bf16, 128, 4, 512, 0, False, -1)]
    for dtype, dim, group, seqlen_q, page_size, options, right in cases:

        def meta(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        with recorded_launches(family) as specs:
            cache, table = meta(8, 2, 4096, dim), None
            if page_size:
                cache, table = meta(99, 2, page_size, dim), meta(8, 64, dtype=torch.int32)
            per_head = meta(2 * group, dtype=torch.float32) if options else None
            decode_attention(
                meta(8, 2 * group, seqlen_q, dim),
                cache,
                cache,
                meta(8, dtype=torch.int32),
                table,
                per_head,
                per_head,
                1000 if options else -1,
                right,
                30.0 if options else 0.0,
                0.125,
            )
        yield from specs
