"""Flash attention in Triton: the forward pass, and the functions of the family.

Source: Dao, "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning",
2023.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_backward import attention_backward, varlen_attention_backward
from .attention_configs import forward_tiles
from .attention_tiles import (
    LN2,
    LOG2E,
    RUNTIME_SIZES,
    Layout,
    aligned,
    check_served,
    head_base,
    key_ranges,
    load_tile,
    masked_logits,
    positive_scale,
    row_ends,
    sequence_bounds,
    store_tile,
    tile_offsets,
)
from .common import KernelSpec, dropout_keep, launch, recorded_launches

__all__ = [
    "attention_backward",
    "attention_forward",
    "kernel_specs",
    "varlen_attention_backward",
    "varlen_attention_forward",
]

# ------------------------------------------------------------------------------------------------
# Device helpers
# ------------------------------------------------------------------------------------------------


@triton.jit
def _attend(
    acc, row_sum, row_max, q, ends,
    k_base, stride_ks, v_base, stride_vs, pad_base, stride_pad_s,
    begin, end, key_end, scale_log2,
    seed, batch, head, row, threshold,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Fold the key blocks from `begin` to `end` into the running softmax of a query block.

    `row_max` is in the units of exp2, that is, scaled by `scale_log2`.
    """
    BLOCK_M: tl.constexpr = q.shape[0]
    k_offsets = tile_offsets(stride_ks, BLOCK_N, q.shape[1])  # (BLOCK_N, BLOCK_D)
    v_offsets = tile_offsets(stride_vs, BLOCK_N, q.shape[1])  # (BLOCK_N, BLOCK_D)
    for start in range(begin, end, BLOCK_N):
        k = load_tile(k_base, k_offsets, start, stride_ks, key_end, HEAD_DIM, MASKED)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # (BLOCK_M, BLOCK_N)
        if MASKED:
            columns = start + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
            logits = masked_logits(logits, columns, ends, pad_base, stride_pad_s, key_end, 1)
        new_max = tl.maximum(row_max, tl.max(logits, 1) * scale_log2)  # (BLOCK_M,)
        shift = new_max
        if MASKED:
            # Nothing seen so far: any finite shift makes the weights 0 instead of NaN.
            shift = tl.where(new_max == -float("inf"), 0.0, new_max)
        weights = tl.exp2(logits * scale_log2 - shift[:, None])  # (BLOCK_M, BLOCK_N)
        rescale = tl.exp2(row_max - shift)  # (BLOCK_M,)
        row_sum = row_sum * rescale + tl.sum(weights, 1)
        acc = acc * rescale[:, None]
        if DROPOUT:
            keep = dropout_keep(seed, batch, head, row, start, threshold, BLOCK_M, BLOCK_N)
            weights = tl.where(keep, weights, 0.0)
        v = load_tile(v_base, v_offsets, start, stride_vs, key_end, HEAD_DIM, MASKED)
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=PRECISION)
        row_max = new_max
    return acc, row_sum, row_max


# ------------------------------------------------------------------------------------------------
# Kernels
# ------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def attention_forward_kernel(
    q_ptr, stride_qb, stride_qh, stride_qs,
    k_ptr, stride_kb, stride_kh, stride_ks,
    v_ptr, stride_vb, stride_vh, stride_vs,
    out_ptr, stride_ob, stride_oh, stride_os,
    lse_ptr, stride_lb, stride_lh,
    padding, stride_pad_b, stride_pad_s,
    key_lengths, cu_seqlens_q, cu_seqlens_k, seed_ptr,
    heads, seqlen_q, seqlen_k, sm_scale, threshold, dropout_scale,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr,
    BOTTOM_RIGHT: tl.constexpr, PRECISION: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EDGE_N: tl.constexpr,
):  # fmt: skip
    """Compute one query block of one head: its output rows and their lse.

    Grid: (query blocks * heads * batch,), query blocks fastest, so that neighbours read the same
    keys and values from L2; under a causal mask the longest rows start first.
    """
    blocks = tl.cdiv(seqlen_q, BLOCK_M)
    pid = tl.program_id(0)
    batch = pid // (blocks * heads)
    head = pid // blocks % heads
    row = (pid % blocks) * BLOCK_M
    if CAUSAL:
        row = (blocks - 1) * BLOCK_M - row
    start_q, start_k, seqlen_q, seqlen_k, key_end, diagonal = sequence_bounds(
        batch, cu_seqlens_q, cu_seqlens_k, key_lengths, seqlen_q, seqlen_k, BOTTOM_RIGHT
    )
    if row >= seqlen_q:
        return

    stride_qs, stride_ks = aligned(stride_qs, ALIGN), aligned(stride_ks, ALIGN)
    stride_vs, stride_os = aligned(stride_vs, ALIGN), aligned(stride_os, ALIGN)
    kv_head = head // GROUP
    q_base = head_base(q_ptr, batch, head, start_q, stride_qb, stride_qh, stride_qs, ALIGN)
    k_base = head_base(k_ptr, batch, kv_head, start_k, stride_kb, stride_kh, stride_ks, ALIGN)
    v_base = head_base(v_ptr, batch, kv_head, start_k, stride_vb, stride_vh, stride_vs, ALIGN)
    q_offsets = tile_offsets(stride_qs, BLOCK_M, BLOCK_D)  # (BLOCK_M, BLOCK_D)
    q = load_tile(q_base, q_offsets, row, stride_qs, seqlen_q, HEAD_DIM, True)
    rows = row + tl.arange(0, BLOCK_M)  # (BLOCK_M,)
    ends = row_ends(rows, key_end, diagonal, CAUSAL)  # (BLOCK_M,)
    full_end, visible_end = key_ranges(
        row, seqlen_q, key_end, diagonal, padding, CAUSAL, BLOCK_M, BLOCK_N
    )
    pad_base = None
    if padding is not None:
        pad_base = padding + batch.to(tl.int64) * stride_pad_b
    seed = 0
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)

    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    row_max = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    for MASKED in tl.static_range(0 if padding is None else 1, 2):
        acc, row_sum, row_max = _attend(
            acc, row_sum, row_max, q, ends,
            k_base, stride_ks, v_base, stride_vs, pad_base, stride_pad_s,
            full_end if MASKED else 0, visible_end if MASKED else full_end, key_end,
            sm_scale * LOG2E,
            seed, batch, head, row, threshold,
            HEAD_DIM, EDGE_N if MASKED else BLOCK_N, MASKED, seed_ptr is not None, PRECISION,
        )  # fmt: skip

    empty = row_sum == 0  # (BLOCK_M,)
    row_sum = tl.where(empty, 1.0, row_sum)
    lse = tl.where(empty, -float("inf"), (row_max + tl.log2(row_sum)) * LN2)  # (BLOCK_M,)
    lse_base = lse_ptr + batch.to(tl.int64) * stride_lb + head.to(tl.int64) * stride_lh + start_q
    tl.store(lse_base + rows, lse, mask=rows < seqlen_q)
    factor = 1.0 / row_sum  # (BLOCK_M,)
    if seed_ptr is not None:
        factor = factor * dropout_scale
    out_base = head_base(out_ptr, batch, head, start_q, stride_ob, stride_oh, stride_os, ALIGN)
    store_tile(out_base, acc * factor[:, None], row, stride_os, seqlen_q, HEAD_DIM)


# ------------------------------------------------------------------------------------------------
# Launchers
# ------------------------------------------------------------------------------------------------


def _launch_forward(
    layout: Layout, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, **options: Any
) -> None:
    """Write `out` and `lse`; `options` are those of `Layout.arguments`."""
    demand = layout.demand(options["dropout_p"])
    tiles = forward_tiles(layout.family, layout.block_d, layout.dtype, demand)
    arguments = {
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "out_ptr": out,
        "lse_ptr": lse,
        **layout.arguments(lse, **options),
        **layout.strides(q=q, k=k, v=v, o=out),
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "EDGE_N": tiles.edge,
    }
    blocks = triton.cdiv(layout.seqlen_q, tiles.block_m)
    launch(
        attention_forward_kernel,
        (blocks * layout.heads * layout.batch,),
        arguments,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    key_padding_mask: Tensor | None,
    key_lengths: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
    causal: str,
    window_left: int,
    window_right: int,
    softcap: float,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """Return the attention output, like `q` (B, H, Sq, D), and lse (B, H, Sq) in float32.

    `k` and `v` are (B, Hkv, Sk, D), Hkv a divisor of H, with any strides whose last one is 1. Rows
    that see no key get 0 and -inf. Raises `ValueError` for bias, window, softcap, ALiBi or sinks.
    """
    check_served(bias, alibi_slopes, sinks, window_left, window_right, softcap)
    layout = Layout.dense(q, k)
    shape = (layout.batch, layout.heads, layout.seqlen_q)
    if layout.seqlen_k == 0:
        return torch.zeros_like(q), q.new_full(shape, -float("inf"), dtype=torch.float32)
    out, lse = torch.empty_like(q), q.new_empty(shape, dtype=torch.float32)
    q, scale = positive_scale(q, scale)
    _launch_forward(
        layout,
        q,
        k,
        v,
        out,
        lse,
        key_lengths=key_lengths,
        key_padding_mask=key_padding_mask,
        seed=seed,
        causal=causal,
        scale=scale,
        dropout_p=dropout_p,
    )
    return out, lse


def varlen_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
    causal: str,
    window_left: int,
    window_right: int,
    softcap: float,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """Return the output of packed sequences, like `q` (Tq, H, D), and lse (H, Tq) in float32.

    `k` and `v` are (Tk, Hkv, D); sequence n owns rows ``cu_seqlens[n]`` to ``cu_seqlens[n + 1]``.
    Rows that no sequence owns get 0 and -inf: a captured graph may carry a padded tail. Raises
    `ValueError` for window, softcap, ALiBi or sinks.
    """
    check_served(None, alibi_slopes, sinks, window_left, window_right, softcap)
    layout = Layout.packed(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    out = torch.zeros_like(q)
    lse = q.new_full((layout.heads, q.shape[0]), -float("inf"), dtype=torch.float32)
    q, scale = positive_scale(q, scale)
    if layout.seqlen_k:
        options = {"seed": seed, "causal": causal, "scale": scale, "dropout_p": dropout_p}
        _launch_forward(layout, q, k, v, out, lse, **options)
    return out, lse


# ------------------------------------------------------------------------------------------------
# Specs
# ------------------------------------------------------------------------------------------------


def kernel_specs(family: str) -> Iterator[KernelSpec]:
    """Yield the launches of representative calls with the configs of an architecture family.

    Every head dim class in each demand of its configs, those that fill their tiles and those that
    do not, with the masks, packing and grouped heads spread over them; single precision once.
    """
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    cases = [(bf16, dim, "none", 0.0, "") for dim in (16, 32, 64, 128, 256)]
    cases += [(bf16, dim, "top_left", 0.0, "") for dim in (16, 32, 64, 128, 256)]
    cases += [(fp16, dim, "bottom_right", 0.0, "packed") for dim in (24, 40, 96, 200)]
    cases += [(bf16, 80, "none", 0.0, ""), (fp16, 40, "none", 0.0, "mask")]
    cases += [(bf16, dim, "top_left", 0.1, "lengths") for dim in (16, 32, 64, 128, 256)]
    cases += [(fp16, dim, "bottom_right", 0.1, "packed") for dim in (40, 80)]
    cases += [(fp32, dim, "top_left", 0.1, "mask") for dim in (16, 32, 64, 128, 256)]
    for dtype, dim, causal, dropout_p, kind in cases:
        with recorded_launches(family) as specs:
            _representative_call(dtype, dim, causal, dropout_p, kind)
        yield from specs


def _representative_call(
    dtype: torch.dtype, dim: int, causal: str, dropout_p: float, kind: str
) -> None:
    """Run forward and backward of a call on the meta device."""

    def meta(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    seed = meta(dtype=torch.int64) if dropout_p else None
    options = (seed, causal, -1, -1, 0.0, 0.125, dropout_p)
    if kind == "packed":
        q, k, boundaries = meta(4096, 4, dim), meta(4096, 2, dim), meta(5, dtype=torch.int32)
        sequences = (boundaries, boundaries, 2048, 2048, None, None)
        out, lse = varlen_attention_forward(q, k, k, *sequences, *options)
        varlen_attention_backward(out, lse, q, k, k, out, lse, *sequences, *options)
        return
    q, k = meta(2, 4, 2048, dim), meta(2, 4, 2048, dim)
    mask = meta(2, 2048, dtype=torch.bool) if kind == "mask" else None
    lengths = meta(2, dtype=torch.int32) if kind == "lengths" else None
    masks = (None, mask, lengths, None, None)
    out, lse = attention_forward(q, k, k, *masks, *options)
    attention_backward(out, None, q, k, k, out, lse, *masks, *options, False)
