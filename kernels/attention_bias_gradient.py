"""The gradient of an additive bias: a sum of logit gradients over the dimensions it broadcasts.

A program owns one tile of queries by keys of one entry of the bias, and walks over the batch
entries and heads that share it, recomputing two products for each: the full gradient of the logits,
which would be as large as the logits, never exists. No atomics, hence deterministic: where few
programs would do all the work the shared entries are divided, and parts are added up at the end, as
are tiles along a dimension of queries or keys that is broadcast.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_configs import Tiles
from .attention_gradients import logit_gradients
from .attention_layout import Layout, Options
from .attention_logits import LOG2E, Scoring, batch_padding, head_bias, head_slope
from .attention_tiles import (
    RUNTIME_SIZES,
    aligned,
    head_base,
    load_tile,
    sequence_bounds,
    tile_offsets,
)
from .common import launch

# ------------------------------------------------------------------------------------------------
# Configs
# ------------------------------------------------------------------------------------------------

# Programs that keep a large GPU busy: below it, what a program sums over is divided.
_ENOUGH_PROGRAMS = 512

# Integers that change with lengths and batches, beside those that all passes have.
_STRIDES = ("stride_dp", "stride_db", "stride_dh", "stride_dm")
_SIZES = ("bias_heads", "shared_heads", "shared", "parts")

# ------------------------------------------------------------------------------------------------
# Kernels
# ------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=[*RUNTIME_SIZES, *_STRIDES, *_SIZES])
def attention_bias_gradient_kernel(
    q_ptr, stride_qb, stride_qh, stride_qs,
    k_ptr, stride_kb, stride_kh, stride_ks,
    v_ptr, stride_vb, stride_vh, stride_vs,
    dout_ptr, stride_dob, stride_doh, stride_dos,
    dbias_ptr, stride_dp, stride_db, stride_dh, stride_dm, stride_dn,
    lse_log2_ptr, delta_ptr, stride_lb, stride_lh,
    bias_ptr, stride_bias_b, stride_bias_h, stride_bias_m, stride_bias_n,
    padding_ptr, stride_pad_b, stride_pad_s, slopes_ptr,
    key_lengths, cu_seqlens_q, cu_seqlens_k, seed_ptr,
    heads, seqlen_q, seqlen_k, window_left, window_right, sm_scale, softcap,
    threshold, dropout_scale, bias_heads, shared_heads, shared, parts,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BOTTOM_RIGHT: tl.constexpr, PRECISION: tl.constexpr, ALIGN: tl.constexpr,
    BIAS_ALIGN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SUM_ROWS: tl.constexpr, SUM_KEYS: tl.constexpr,
):  # fmt: skip
    """Compute one part of one tile of dbias.

    Grid: (key blocks * query blocks * parts * bias heads * bias batches,), in this order. `shared`
    pairs of batch entry and head use one entry of the bias, `shared_heads` heads of each; a program
    takes every `parts`-th. `dbias_ptr` is (parts, batches, heads, query rows or blocks, keys or key
    blocks).
    """
    blocks_k, blocks_q = tl.cdiv(seqlen_k, BLOCK_N), tl.cdiv(seqlen_q, BLOCK_M)
    block_k = tl.program_id(0) % blocks_k
    block_q = tl.program_id(0) // blocks_k % blocks_q
    entry = tl.program_id(0) // blocks_k // blocks_q
    part = entry % parts
    bias_head = entry // parts % bias_heads
    bias_batch = entry // parts // bias_heads
    first_key, row = block_k * BLOCK_N, block_q * BLOCK_M
    stride_qs, stride_ks = aligned(stride_qs, ALIGN), aligned(stride_ks, ALIGN)
    stride_vs, stride_dos = aligned(stride_vs, ALIGN), aligned(stride_dos, ALIGN)
    q_offsets = tile_offsets(stride_qs, BLOCK_M, BLOCK_D)  # (BLOCK_M, BLOCK_D)
    dout_offsets = tile_offsets(stride_dos, BLOCK_M, BLOCK_D)  # (BLOCK_M, BLOCK_D)
    k_offsets = tile_offsets(stride_ks, BLOCK_N, BLOCK_D)  # (BLOCK_N, BLOCK_D)
    v_offsets = tile_offsets(stride_vs, BLOCK_N, BLOCK_D)  # (BLOCK_N, BLOCK_D)
    rows = row + tl.arange(0, BLOCK_M)  # (BLOCK_M,)
    keys = first_key + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    seed = 0
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)

    # A tile that hides all its keys adds nothing. Diagonals at the ends of sequences may differ.
    if (cu_seqlens_q is None and key_lengths is None) or not BOTTOM_RIGHT:
        _start_q, _start_k, _rows, _keys, _end, diagonal = sequence_bounds(
            0, None, None, None, seqlen_q, seqlen_k, BOTTOM_RIGHT
        )
        if window_right is not None:
            last_row = tl.minimum(row + BLOCK_M, seqlen_q) - 1
            shared = tl.where(first_key > last_row + diagonal + window_right, 0, shared)
        if window_left is not None:
            last_key = first_key + BLOCK_N - 1
            shared = tl.where(last_key < row + diagonal - window_left, 0, shared)
    dbias = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for index in range(part, shared, parts):
        batch = bias_batch + index // shared_heads
        head = bias_head + index % shared_heads
        start_q, start_k, rows_end, keys_end, key_end, diagonal = sequence_bounds(
            batch, cu_seqlens_q, cu_seqlens_k, key_lengths, seqlen_q, seqlen_k, BOTTOM_RIGHT
        )
        bias = head_bias(bias_ptr, batch, head, stride_bias_b, stride_bias_h, BIAS_ALIGN)
        slope_log2 = head_slope(slopes_ptr, head)
        padding = batch_padding(padding_ptr, batch, stride_pad_b)
        scoring = Scoring(
            sm_scale * LOG2E, softcap, bias, aligned(stride_bias_m, BIAS_ALIGN), stride_bias_n,
            slope_log2, padding, stride_pad_s,
            rows_end, keys_end, key_end, diagonal, window_left, window_right,
        )  # fmt: skip
        kv_head = head // GROUP
        q_base = head_base(q_ptr, batch, head, start_q, stride_qb, stride_qh, stride_qs, ALIGN)
        k_base = head_base(k_ptr, batch, kv_head, start_k, stride_kb, stride_kh, stride_ks, ALIGN)
        v_base = head_base(v_ptr, batch, kv_head, start_k, stride_vb, stride_vh, stride_vs, ALIGN)
        dout_base = head_base(
            dout_ptr, batch, head, start_q, stride_dob, stride_doh, stride_dos, ALIGN
        )
        q = load_tile(q_base, q_offsets, row, stride_qs, rows_end, HEAD_DIM, True)
        dout = load_tile(dout_base, dout_offsets, row, stride_dos, rows_end, HEAD_DIM, True)
        k = load_tile(k_base, k_offsets, first_key, stride_ks, key_end, HEAD_DIM, True)
        v = load_tile(v_base, v_offsets, first_key, stride_vs, key_end, HEAD_DIM, True)
        places = batch.to(tl.int64) * stride_lb + head.to(tl.int64) * stride_lh + start_q + rows
        real = rows < rows_end  # (BLOCK_M,)
        lse = tl.load(lse_log2_ptr + places, mask=real, other=float("inf"))  # (BLOCK_M,)
        delta = tl.load(delta_ptr + places, mask=real, other=0.0)  # (BLOCK_M,)
        # Of a short sequence most tiles have nothing; where all are as long, a branch only costs.
        alike: tl.constexpr = cu_seqlens_q is None and key_lengths is None
        if alike or (row < rows_end and first_key < key_end):
            dlogits, _derivative = logit_gradients(
                q, dout, lse, delta, row, k, v, first_key, scoring,
                seed, batch, head, threshold, dropout_scale,
                True, False, seed_ptr is not None, PRECISION,
            )  # fmt: skip
            dbias += dlogits

    base = dbias_ptr + part.to(tl.int64) * stride_dp
    base += bias_batch.to(tl.int64) * stride_db + bias_head.to(tl.int64) * stride_dh
    real_row, real_key = rows < seqlen_q, keys < seqlen_k
    row_places, key_places = rows.to(tl.int64) * stride_dm, keys * stride_dn
    if SUM_ROWS:
        row_places = block_q.to(tl.int64) * stride_dm
    if SUM_KEYS:
        key_places = block_k * stride_dn
    if SUM_ROWS and SUM_KEYS:
        tl.store(base + row_places + key_places, tl.sum(tl.sum(dbias, 1), 0))
    elif SUM_ROWS:
        tl.store(base + row_places + key_places, tl.sum(dbias, 0), mask=real_key)
    elif SUM_KEYS:
        tl.store(base + row_places + key_places, tl.sum(dbias, 1), mask=real_row)
    else:
        tl.store(
            base + row_places[:, None] + key_places[None, :],
            dbias.to(dbias_ptr.dtype.element_ty),
            mask=real_row[:, None] & real_key[None, :],
        )


# ------------------------------------------------------------------------------------------------
# Launchers
# ------------------------------------------------------------------------------------------------


def bias_gradient(layout: Layout, options: Options, bias: Tensor, inputs: dict[str, Any]) -> Tensor:
    """Return the gradient of `bias` (up to 4 dimensions, broadcast to (B, H, Sq, Sk)), contiguous.

    For packed sequences B counts them, and Sq and Sk are the longest lengths.

    `inputs` are the arguments of the other backward kernels, with the strides of q, k, v and dout.
    """

    def run(tiles: Tiles) -> Tensor:
        return _bias_gradient(layout, bias, tiles, inputs)

    # Which dimensions are summed makes another kernel.
    broadcast = "".join("1" if size == 1 else "n" for size in bias.shape)
    kind = {**inputs, "BIAS": broadcast}
    kernel = attention_bias_gradient_kernel
    return run(layout.tuned_tiles("bias_gradient", kernel, options, kind, run))


def _bias_gradient(layout: Layout, bias: Tensor, tiles: Tiles, inputs: dict[str, Any]) -> Tensor:
    """Return what `bias_gradient` does, with the given tiles."""
    sizes = (1,) * (4 - bias.dim()) + tuple(bias.shape)
    full = (layout.batch, layout.heads, layout.seqlen_q, layout.seqlen_k)
    if 0 in full:
        return bias.new_zeros(bias.shape)
    blocks_q = triton.cdiv(layout.seqlen_q, tiles.block_m)
    blocks_k = triton.cdiv(layout.seqlen_k, tiles.block_n)
    shared_heads = layout.heads // sizes[1]
    shared = layout.batch // sizes[0] * shared_heads
    programs = blocks_q * blocks_k * sizes[0] * sizes[1]
    parts = min(shared, triton.cdiv(_ENOUGH_PROGRAMS, programs))
    sum_rows = sizes[2] == 1 and layout.seqlen_q > 1
    sum_keys = sizes[3] == 1 and layout.seqlen_k > 1
    single = parts == 1 and not sum_rows and not sum_keys
    dbias = torch.empty(
        (
            parts,
            *sizes[:2],
            blocks_q if sum_rows else layout.seqlen_q,
            blocks_k if sum_keys else layout.seqlen_k,
        ),
        dtype=bias.dtype if single else torch.float32,
        device=bias.device,
    )
    names = ("stride_dp", "stride_db", "stride_dh", "stride_dm", "stride_dn")
    launch(
        attention_bias_gradient_kernel,
        (programs * parts,),
        {
            **inputs,
            "dbias_ptr": dbias,
            **dict(zip(names, dbias.stride(), strict=True)),
            "bias_heads": sizes[1],
            "shared_heads": shared_heads,
            "shared": shared,
            "parts": parts,
            "BLOCK_M": tiles.block_m,
            "BLOCK_N": tiles.block_n,
            "SUM_ROWS": sum_rows,
            "SUM_KEYS": sum_keys,
        },
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    summed = [0] + [3] * sum_rows + [4] * sum_keys
    total = dbias[0] if single else dbias.sum(summed, keepdim=True)[0]
    return total.to(bias.dtype).reshape(bias.shape)
