"""The two gradient passes of flash attention: dk and dv by key block, dq by query block.

With P the probabilities, M the dropout mask times its factor, dP = (dO V^T) * M and
delta = rowsum(dO * O) - dlse, the gradient of the logits is dS = P * (dP - delta). Each pass
recomputes P from the lse; no atomics, hence deterministic.

Source: Dao, "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning",
2023; delta takes in the gradient of lse because dlse / dS = P.
"""

import triton
import triton.language as tl

from .attention_logits import (
    LOG2E,
    Scoring,
    batch_padding,
    finished_logits,
    first_products,
    head_bias,
    head_slope,
    key_ranges,
    query_ranges,
    walk,
    walked,
)
from .attention_tiles import (
    RUNTIME_SIZES,
    aligned,
    head_base,
    load_tile,
    sequence_bounds,
    store_tile,
    tile_offsets,
)
from .common import dropout_keep

# ------------------------------------------------------------------------------------------------
# Device helpers
# ------------------------------------------------------------------------------------------------


@triton.jit
def _add_key_gradients(
    dk, dv, k, v, first_key,
    q_base, stride_qs, dout_base, stride_dos, lse_base, delta_base,
    scoring, begin, head_end, tail, end,
    seed, batch, head, threshold, dropout_scale,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, MASKED: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Add what query blocks give to dk and dv of a key block.

    If MASKED, they are those from `begin` to `head_end` and from `tail` to `end`, else those from
    `begin` to `end`. Logits are held as (key, query): operands of dk and dv as they are.
    """
    BLOCK_N: tl.constexpr = k.shape[0]
    HIDES: tl.constexpr = MASKED and (
        scoring.window_left is not None or scoring.window_right is not None
    )
    q_offsets = tile_offsets(stride_qs, BLOCK_M, k.shape[1])  # (BLOCK_M, BLOCK_D)
    dout_offsets = tile_offsets(stride_dos, BLOCK_M, k.shape[1])  # (BLOCK_M, BLOCK_D)
    first, last, gap = walk(begin, head_end, tail, end, MASKED, True)
    for place in range(first, last, BLOCK_M):
        row = walked(place, head_end, gap, MASKED, True)
        rows = row + tl.arange(0, BLOCK_M)  # (BLOCK_M,)
        q = load_tile(q_base, q_offsets, row, stride_qs, scoring.seqlen_q, HEAD_DIM, MASKED)
        if MASKED:
            # Rows that do not exist add nothing: their q, dout and delta are 0.
            real = rows < scoring.seqlen_q  # (BLOCK_M,)
            lse = tl.load(lse_base + rows, mask=real, other=0.0)  # (BLOCK_M,)
            delta = tl.load(delta_base + rows, mask=real, other=0.0)  # (BLOCK_M,)
        else:
            lse = tl.load(lse_base + rows)  # (BLOCK_M,)
            delta = tl.load(delta_base + rows)  # (BLOCK_M,)
        products = first_products(row, first_key, scoring, 0, HIDES, BLOCK_M, BLOCK_N)
        products = tl.dot(k, tl.trans(q), products, input_precision=PRECISION)
        logits, factor, derivative = finished_logits(
            products, row, first_key, scoring, 0, HIDES, not MASKED, False
        )
        weights = tl.exp2(logits * factor - lse[None, :])  # (BLOCK_N, BLOCK_M)
        dout = load_tile(
            dout_base, dout_offsets, row, stride_dos, scoring.seqlen_q, HEAD_DIM, MASKED
        )
        dweights = tl.dot(v, tl.trans(dout), input_precision=PRECISION)  # (BLOCK_N, BLOCK_M)
        kept = weights
        if DROPOUT:
            keep = dropout_keep(seed, batch, head, row, first_key, threshold, BLOCK_M, BLOCK_N)
            keep = tl.trans(keep)  # (BLOCK_N, BLOCK_M)
            kept = tl.where(keep, weights, 0.0)
            dweights = tl.where(keep, dweights * dropout_scale, 0.0)
        dv = tl.dot(kept.to(dout.dtype), dout, dv, input_precision=PRECISION)
        dlogits = weights * (dweights - delta[None, :]) * derivative  # (BLOCK_N, BLOCK_M)
        dk = tl.dot(dlogits.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def logit_gradients(
    q, dout, lse, delta, row, k, v, start, scoring,
    seed, batch, head, threshold, dropout_scale,
    MASKED: tl.constexpr, KEYS_EXIST: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return dS (BLOCK_M, BLOCK_N), the gradient of a tile of logits behind the softcap.

    The second result is the softcap's derivative, which the gradient of the products lacks.
    """
    BLOCK_M: tl.constexpr = q.shape[0]
    BLOCK_N: tl.constexpr = k.shape[0]
    products = first_products(row, start, scoring, 1, MASKED, BLOCK_M, BLOCK_N)
    products = tl.dot(q, tl.trans(k), products, input_precision=PRECISION)  # (BLOCK_M, BLOCK_N)
    logits, factor, derivative = finished_logits(
        products, row, start, scoring, 1, MASKED, False, KEYS_EXIST
    )
    weights = tl.exp2(logits * factor - lse[:, None])  # (BLOCK_M, BLOCK_N)
    dweights = tl.dot(dout, tl.trans(v), input_precision=PRECISION)  # (BLOCK_M, BLOCK_N)
    if DROPOUT:
        keep = dropout_keep(seed, batch, head, row, start, threshold, BLOCK_M, BLOCK_N)
        dweights = tl.where(keep, dweights * dropout_scale, 0.0)
    return weights * (dweights - delta[:, None]), derivative


@triton.jit
def _add_query_gradient(
    dq, total, q, dout, lse, delta, row,
    k_base, stride_ks, v_base, stride_vs, scoring, begin, head_end, tail, end,
    seed, batch, head, threshold, dropout_scale,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, DROPOUT: tl.constexpr,
    SUM_ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add what key blocks give to dq of a query block; which ones, as in the forward pass.

    With SUM_ROWS `total` adds up dS by row.
    """
    k_offsets = tile_offsets(stride_ks, BLOCK_N, q.shape[1])  # (BLOCK_N, BLOCK_D)
    v_offsets = tile_offsets(stride_vs, BLOCK_N, q.shape[1])  # (BLOCK_N, BLOCK_D)
    HAS_HEAD: tl.constexpr = scoring.window_left is not None
    first, last, gap = walk(begin, head_end, tail, end, MASKED, HAS_HEAD)
    for place in range(first, last, BLOCK_N):
        start = walked(place, head_end, gap, MASKED, HAS_HEAD)
        k = load_tile(k_base, k_offsets, start, stride_ks, scoring.key_end, HEAD_DIM, MASKED)
        v = load_tile(v_base, v_offsets, start, stride_vs, scoring.key_end, HEAD_DIM, MASKED)
        dlogits, derivative = logit_gradients(
            q, dout, lse, delta, row, k, v, start, scoring,
            seed, batch, head, threshold, dropout_scale, MASKED, not MASKED, DROPOUT, PRECISION,
        )  # fmt: skip
        if SUM_ROWS:
            total += tl.sum(dlogits, 1)  # (BLOCK_M,)
        dlogits = (dlogits * derivative).to(k.dtype)  # (BLOCK_M, BLOCK_N)
        dq = tl.dot(dlogits, k, dq, input_precision=PRECISION)
    return dq, total


# ------------------------------------------------------------------------------------------------
# Kernels
# ------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def attention_key_gradient_kernel(
    q_ptr, stride_qb, stride_qh, stride_qs,
    k_ptr, stride_kb, stride_kh, stride_ks,
    v_ptr, stride_vb, stride_vh, stride_vs,
    dout_ptr, stride_dob, stride_doh, stride_dos,
    dk_ptr, stride_dkb, stride_dkh, stride_dks,
    dv_ptr, stride_dvb, stride_dvh, stride_dvs,
    lse_log2_ptr, delta_ptr, stride_lb, stride_lh,
    bias_ptr, stride_bias_b, stride_bias_h, stride_bias_m, stride_bias_n,
    padding_ptr, stride_pad_b, stride_pad_s, slopes_ptr,
    key_lengths, cu_seqlens_q, cu_seqlens_k, seed_ptr,
    heads, seqlen_q, seqlen_k, window_left, window_right, sm_scale, softcap,
    threshold, dropout_scale,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BOTTOM_RIGHT: tl.constexpr, PRECISION: tl.constexpr, ALIGN: tl.constexpr,
    BIAS_ALIGN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EDGE_M: tl.constexpr,
):  # fmt: skip
    """Compute dk and dv of one key block of one key head, over all query heads that share it.

    Grid: (key blocks * key heads * batch,), key blocks fastest. What padded keys collect may not be
    finite, but it stays in their own rows, which are zeroed at the end: no block masks them.
    """
    blocks = tl.cdiv(seqlen_k, BLOCK_N)
    kv_heads = heads // GROUP
    pid = tl.program_id(0)
    batch = pid // (blocks * kv_heads)
    kv_head = pid // blocks % kv_heads
    first_key = (pid % blocks) * BLOCK_N
    start_q, start_k, seqlen_q, seqlen_k, key_end, diagonal = sequence_bounds(
        batch, cu_seqlens_q, cu_seqlens_k, key_lengths, seqlen_q, seqlen_k, BOTTOM_RIGHT
    )
    if first_key >= seqlen_k:
        return

    stride_qs, stride_ks = aligned(stride_qs, ALIGN), aligned(stride_ks, ALIGN)
    stride_vs, stride_dos = aligned(stride_vs, ALIGN), aligned(stride_dos, ALIGN)
    stride_dks, stride_dvs = aligned(stride_dks, ALIGN), aligned(stride_dvs, ALIGN)
    k_base = head_base(k_ptr, batch, kv_head, start_k, stride_kb, stride_kh, stride_ks, ALIGN)
    v_base = head_base(v_ptr, batch, kv_head, start_k, stride_vb, stride_vh, stride_vs, ALIGN)
    k_offsets = tile_offsets(stride_ks, BLOCK_N, BLOCK_D)  # (BLOCK_N, BLOCK_D)
    v_offsets = tile_offsets(stride_vs, BLOCK_N, BLOCK_D)  # (BLOCK_N, BLOCK_D)
    k = load_tile(k_base, k_offsets, first_key, stride_ks, seqlen_k, HEAD_DIM, True)
    v = load_tile(v_base, v_offsets, first_key, stride_vs, seqlen_k, HEAD_DIM, True)

    seed = 0
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)

    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        q_base = head_base(q_ptr, batch, head, start_q, stride_qb, stride_qh, stride_qs, ALIGN)
        dout_base = head_base(
            dout_ptr, batch, head, start_q, stride_dob, stride_doh, stride_dos, ALIGN
        )
        rows_base = batch.to(tl.int64) * stride_lb + head.to(tl.int64) * stride_lh + start_q
        bias = head_bias(bias_ptr, batch, head, stride_bias_b, stride_bias_h, BIAS_ALIGN)
        slope_log2 = head_slope(slopes_ptr, head)
        scoring = Scoring(
            sm_scale * LOG2E, softcap, bias, aligned(stride_bias_m, BIAS_ALIGN), stride_bias_n,
            slope_log2, None, 0,
            seqlen_q, seqlen_k, key_end, diagonal, window_left, window_right,
        )  # fmt: skip
        begin, head_end, full, full_end, end = query_ranges(
            first_key, scoring, BLOCK_N, BLOCK_M, EDGE_M
        )
        for MASKED in tl.static_range(2):
            dk, dv = _add_key_gradients(
                dk, dv, k, v, first_key,
                q_base, stride_qs, dout_base, stride_dos,
                lse_log2_ptr + rows_base, delta_ptr + rows_base,
                scoring, begin if MASKED else full, head_end, full_end, end if MASKED else full_end,
                seed, batch, head, threshold, dropout_scale,
                HEAD_DIM, EDGE_M if MASKED else BLOCK_M, MASKED, seed_ptr is not None, PRECISION,
            )  # fmt: skip

    keys = first_key + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    real = keys < key_end  # (BLOCK_N,)
    if padding_ptr is not None:
        pad_base = padding_ptr + batch.to(tl.int64) * stride_pad_b
        padded = tl.load(pad_base + keys * stride_pad_s, mask=real, other=1)  # (BLOCK_N,)
        real = real & (padded == 0)
    if seed_ptr is not None:
        dv = dv * dropout_scale
    dk = tl.where(real[:, None], dk * sm_scale, 0.0)
    dv = tl.where(real[:, None], dv, 0.0)
    dk_base = head_base(dk_ptr, batch, kv_head, start_k, stride_dkb, stride_dkh, stride_dks, ALIGN)
    dv_base = head_base(dv_ptr, batch, kv_head, start_k, stride_dvb, stride_dvh, stride_dvs, ALIGN)
    store_tile(dk_base, dk, first_key, stride_dks, seqlen_k, HEAD_DIM)
    store_tile(dv_base, dv, first_key, stride_dvs, seqlen_k, HEAD_DIM)


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def attention_query_gradient_kernel(
    q_ptr, stride_qb, stride_qh, stride_qs,
    k_ptr, stride_kb, stride_kh, stride_ks,
    v_ptr, stride_vb, stride_vh, stride_vs,
    dout_ptr, stride_dob, stride_doh, stride_dos,
    dq_ptr, stride_dqb, stride_dqh, stride_dqs,
    total_ptr, lse_log2_ptr, delta_ptr, stride_lb, stride_lh,
    bias_ptr, stride_bias_b, stride_bias_h, stride_bias_m, stride_bias_n,
    padding_ptr, stride_pad_b, stride_pad_s, slopes_ptr,
    key_lengths, cu_seqlens_q, cu_seqlens_k, seed_ptr,
    heads, seqlen_q, seqlen_k, window_left, window_right, sm_scale, softcap,
    threshold, dropout_scale,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BOTTOM_RIGHT: tl.constexpr, PRECISION: tl.constexpr, ALIGN: tl.constexpr,
    BIAS_ALIGN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EDGE_N: tl.constexpr,
):  # fmt: skip
    """Compute dq of one query block of one head; grid and key blocks as in the forward pass.

    `total_ptr`, which the gradient of sinks needs, gets the sums of dS over the keys, like the lse.
    """
    blocks = tl.cdiv(seqlen_q, BLOCK_M)
    pid = tl.program_id(0)
    batch = pid // (blocks * heads)
    head = pid // blocks % heads
    row = (pid % blocks) * BLOCK_M
    if window_right is not None:
        row = (blocks - 1) * BLOCK_M - row
    start_q, start_k, seqlen_q, seqlen_k, key_end, diagonal = sequence_bounds(
        batch, cu_seqlens_q, cu_seqlens_k, key_lengths, seqlen_q, seqlen_k, BOTTOM_RIGHT
    )
    if row >= seqlen_q:
        return

    stride_qs, stride_ks = aligned(stride_qs, ALIGN), aligned(stride_ks, ALIGN)
    stride_vs, stride_dos = aligned(stride_vs, ALIGN), aligned(stride_dos, ALIGN)
    stride_dqs = aligned(stride_dqs, ALIGN)
    kv_head = head // GROUP
    q_base = head_base(q_ptr, batch, head, start_q, stride_qb, stride_qh, stride_qs, ALIGN)
    k_base = head_base(k_ptr, batch, kv_head, start_k, stride_kb, stride_kh, stride_ks, ALIGN)
    v_base = head_base(v_ptr, batch, kv_head, start_k, stride_vb, stride_vh, stride_vs, ALIGN)
    dout_base = head_base(dout_ptr, batch, head, start_q, stride_dob, stride_doh, stride_dos, ALIGN)
    q_offsets = tile_offsets(stride_qs, BLOCK_M, BLOCK_D)  # (BLOCK_M, BLOCK_D)
    dout_offsets = tile_offsets(stride_dos, BLOCK_M, BLOCK_D)  # (BLOCK_M, BLOCK_D)
    q = load_tile(q_base, q_offsets, row, stride_qs, seqlen_q, HEAD_DIM, True)
    dout = load_tile(dout_base, dout_offsets, row, stride_dos, seqlen_q, HEAD_DIM, True)
    rows = row + tl.arange(0, BLOCK_M)  # (BLOCK_M,)
    rows_base = batch.to(tl.int64) * stride_lb + head.to(tl.int64) * stride_lh + start_q
    lse = tl.load(lse_log2_ptr + rows_base + rows, mask=rows < seqlen_q, other=0.0)  # (BLOCK_M,)
    delta = tl.load(delta_ptr + rows_base + rows, mask=rows < seqlen_q, other=0.0)  # (BLOCK_M,)
    bias = head_bias(bias_ptr, batch, head, stride_bias_b, stride_bias_h, BIAS_ALIGN)
    slope_log2 = head_slope(slopes_ptr, head)
    padding = batch_padding(padding_ptr, batch, stride_pad_b)
    scoring = Scoring(
        sm_scale * LOG2E, softcap, bias, aligned(stride_bias_m, BIAS_ALIGN), stride_bias_n,
        slope_log2, padding, stride_pad_s,
        seqlen_q, seqlen_k, key_end, diagonal, window_left, window_right,
    )  # fmt: skip
    begin, head_end, full, full_end, end = key_ranges(row, scoring, BLOCK_M, BLOCK_N, EDGE_N)
    seed = 0
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)

    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for MASKED in tl.static_range(0 if padding_ptr is None else 1, 2):
        dq, total = _add_query_gradient(
            dq, total, q, dout, lse, delta, row,
            k_base, stride_ks, v_base, stride_vs, scoring,
            begin if MASKED else full, head_end, full_end, end if MASKED else full_end,
            seed, batch, head, threshold, dropout_scale,
            HEAD_DIM, EDGE_N if MASKED else BLOCK_N, MASKED, seed_ptr is not None,
            total_ptr is not None, PRECISION,
        )  # fmt: skip
    dq_base = head_base(dq_ptr, batch, head, start_q, stride_dqb, stride_dqh, stride_dqs, ALIGN)
    store_tile(dq_base, dq * sm_scale, row, stride_dqs, seqlen_q, HEAD_DIM)
    if total_ptr is not None:
        tl.store(total_ptr + rows_base + rows, total, mask=rows < seqlen_q)
