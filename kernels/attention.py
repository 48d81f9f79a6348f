"""Flash attention in Triton: the forward pass, and the functions of the family.

Source: Dao, "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning",
2023.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_backward import attention_backward, varlen_attention_backward
from .attention_layout import Layout, Options, laid_out_like, near, positive_scale
from .attention_logits import (
    LN2,
    LOG2E,
    Scoring,
    batch_padding,
    finished_logits,
    first_products,
    head_bias,
    head_slope,
    key_ranges,
    walk,
    walked,
)
from .attention_tiles import (
    RUNTIME_SIZES,
    aligned,
    head_base,
    load_rows,
    load_tile,
    place_keys,
    sequence_bounds,
    store_tile,
    tile_offsets,
)
from .common import KernelSpec, dropout_keep, recorded_launches

__all__ = [
    "attention_backward",
    "attention_forward",
    "cached_attention_forward",
    "kernel_specs",
    "varlen_attention_backward",
    "varlen_attention_forward",
]

# ------------------------------------------------------------------------------------------------
# Device helpers
# ------------------------------------------------------------------------------------------------


@triton.jit
def _attend(
    acc, row_sum, row_max, q, row,
    k_base, stride_ks, v_base, stride_vs, scoring, begin, head_end, tail, end,
    seed, batch, head, threshold, table_ptr, pages, stride_kb, stride_vb,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, DROPOUT: tl.constexpr,
    PAGE_SIZE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Fold key blocks into the running softmax of a query block.

    If MASKED, they are those from `begin` to `head_end` and from `tail` to `end`, else those from
    `begin` to `end`. `row_max` is in the units of exp2.
    """
    BLOCK_M: tl.constexpr = q.shape[0]
    k_offsets = tile_offsets(stride_ks, BLOCK_N, q.shape[1])  # (BLOCK_N, BLOCK_D)
    v_offsets = tile_offsets(stride_vs, BLOCK_N, q.shape[1])  # (BLOCK_N, BLOCK_D)
    HAS_HEAD: tl.constexpr = scoring.window_left is not None
    first, last, gap = walk(begin, head_end, tail, end, MASKED, HAS_HEAD)
    for place in range(first, last, BLOCK_N):
        start = walked(place, head_end, gap, MASKED, HAS_HEAD)
        if table_ptr is None:
            k = load_tile(k_base, k_offsets, start, stride_ks, scoring.key_end, HEAD_DIM, MASKED)
        else:
            real = start + tl.arange(0, BLOCK_N) < scoring.key_end if MASKED else None  # (BLOCK_N,)
            entry, slots = place_keys(
                table_ptr, batch, scoring.seqlen_k // PAGE_SIZE, 1, pages, start, scoring.key_end,
                PAGE_SIZE, BLOCK_N,
            )  # fmt: skip
            k = load_rows(k_base, entry, slots, stride_kb, stride_ks, real, HEAD_DIM, q.shape[1])
        products = first_products(row, start, scoring, 1, MASKED, BLOCK_M, BLOCK_N)
        products = tl.dot(q, tl.trans(k), products, input_precision=PRECISION)
        logits, factor, _ = finished_logits(
            products, row, start, scoring, 1, MASKED, False, not MASKED
        )
        new_max = tl.maximum(row_max, tl.max(logits, 1) * factor)  # (BLOCK_M,)
        shift = new_max
        if MASKED or scoring.bias is not None:
            # Nothing seen so far: any finite shift makes the weights 0 instead of NaN.
            shift = tl.where(new_max == -float("inf"), 0.0, new_max)
        weights = tl.exp2(logits * factor - shift[:, None])  # (BLOCK_M, BLOCK_N)
        rescale = tl.exp2(row_max - shift)  # (BLOCK_M,)
        row_sum = row_sum * rescale + tl.sum(weights, 1)
        acc = acc * rescale[:, None]
        if DROPOUT:
            keep = dropout_keep(seed, batch, head, row, start, threshold, BLOCK_M, BLOCK_N)
            weights = tl.where(keep, weights, 0.0)
        if table_ptr is None:
            v = load_tile(v_base, v_offsets, start, stride_vs, scoring.key_end, HEAD_DIM, MASKED)
        else:
            v = load_rows(v_base, entry, slots, stride_vb, stride_vs, real, HEAD_DIM, q.shape[1])
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
    bias_ptr, stride_bias_b, stride_bias_h, stride_bias_m, stride_bias_n,
    padding_ptr, stride_pad_b, stride_pad_s, slopes_ptr, sinks_ptr,
    key_lengths, cu_seqlens_q, cu_seqlens_k, seed_ptr,
    heads, seqlen_q, seqlen_k, window_left, window_right, sm_scale, softcap,
    threshold, dropout_scale,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BOTTOM_RIGHT: tl.constexpr, PRECISION: tl.constexpr, ALIGN: tl.constexpr,
    BIAS_ALIGN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EDGE_N: tl.constexpr,
    table_ptr=None, pages=None, PAGE_SIZE: tl.constexpr = None,
):  # fmt: skip
    """Compute one query block of one head: its output rows and their lse.

    Grid: (query blocks * heads * batch,), query blocks fastest, so that neighbours read the same
    keys and values from L2; under a causal mask the longest rows start first. With a table, keys
    and values lie in pages of PAGE_SIZE: `table_ptr` (batch, seqlen_k // PAGE_SIZE) tells which.
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
    stride_vs, stride_os = aligned(stride_vs, ALIGN), aligned(stride_os, ALIGN)
    kv_head = head // GROUP
    q_base = head_base(q_ptr, batch, head, start_q, stride_qb, stride_qh, stride_qs, ALIGN)
    entry = batch if table_ptr is None else batch * 0
    k_base = head_base(k_ptr, entry, kv_head, start_k, stride_kb, stride_kh, stride_ks, ALIGN)
    v_base = head_base(v_ptr, entry, kv_head, start_k, stride_vb, stride_vh, stride_vs, ALIGN)
    q_offsets = tile_offsets(stride_qs, BLOCK_M, BLOCK_D)  # (BLOCK_M, BLOCK_D)
    q = load_tile(q_base, q_offsets, row, stride_qs, seqlen_q, HEAD_DIM, True)
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

    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    row_max = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    for MASKED in tl.static_range(0 if padding_ptr is None else 1, 2):
        acc, row_sum, row_max = _attend(
            acc, row_sum, row_max, q, row,
            k_base, stride_ks, v_base, stride_vs, scoring,
            begin if MASKED else full, head_end, full_end, end if MASKED else full_end,
            seed, batch, head, threshold,
            table_ptr, pages, aligned(stride_kb, ALIGN), aligned(stride_vb, ALIGN),
            HEAD_DIM, EDGE_N if MASKED else BLOCK_N, MASKED, seed_ptr is not None, PAGE_SIZE,
            PRECISION,
        )  # fmt: skip

    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + head).to(tl.float32) * LOG2E
        new_max = tl.maximum(row_max, sink)  # (BLOCK_M,)
        shift = tl.where(new_max == -float("inf"), 0.0, new_max)  # (BLOCK_M,)
        rescale = tl.exp2(row_max - shift)  # (BLOCK_M,)
        row_sum = row_sum * rescale + tl.exp2(sink - shift)
        acc = acc * rescale[:, None]
        row_max = new_max
    rows = row + tl.arange(0, BLOCK_M)  # (BLOCK_M,)
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
    layout: Layout,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    options: Options,
    **changed: object,
) -> None:
    """Write `out` and `lse`; `changed` are arguments of the kernel that a cache has otherwise."""
    sinks = options.sinks
    arguments = {
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "out_ptr": out,
        "lse_ptr": lse,
        "sinks_ptr": None if sinks is None else sinks.float(),
        **layout.arguments(lse, options),
        **layout.strides(q=q, k=k, v=v, o=out),
        **changed,
    }
    layout.launch_pass("forward", attention_forward_kernel, options, arguments)


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

    `k` and `v` are (B, Hkv, Sk, D), Hkv a divisor of H, with any strides whose last one is 1;
    `bias` broadcasts to (B, H, Sq, Sk). Rows that see no key get 0, and -inf or their sink.
    """
    layout = Layout.dense(q, k)
    given = q
    q, k, v = (near(x, 2) for x in (q, k, v))
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    used = q
    q, scale = positive_scale(q, scale)
    masks = (bias, key_padding_mask, key_lengths, alibi_slopes, sinks)
    options = Options(seed, causal, window_left, window_right, softcap, scale, dropout_p, *masks)
    _launch_forward(layout, q, k, v, out, lse, options)
    return laid_out_like(out, given, used), lse


def cached_attention_forward(
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
    """Return the output, like `q` (B, H, Sq, D), and lse (B, H, Sq) of many new tokens.

    Arguments are those of `kernels.decode.decode_attention`: the diagonal ends at the last of each
    `cache_lengths`, and 0 to the right of the window is causal. Pages are read where they lie.
    """
    page_size = capacity = k_cache.shape[2]
    pages: dict[str, object] = {}
    if block_table is not None:
        capacity *= block_table.shape[1] if k_cache.shape[0] else 0
        pages = {
            "table_ptr": block_table.contiguous(),
            "pages": k_cache.shape[0],
            "PAGE_SIZE": page_size,
        }
    if cache_lengths.dtype != torch.int32:
        cache_lengths = cache_lengths.clamp(0, capacity).int()
    layout = replace(Layout.dense(q, k_cache), seqlen_k=capacity)
    given = q
    q = near(q, 2)
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    used = q
    q, scale = positive_scale(q, scale)
    options = Options(
        None, "none", window_left, window_right, softcap, scale, 0.0,
        key_lengths=cache_lengths.contiguous(),
        alibi_slopes=None if alibi_slopes is None else alibi_slopes.contiguous(),
        sinks=None if sinks is None else sinks.contiguous(),
    )  # fmt: skip
    _launch_forward(layout, q, k_cache, v_cache, out, lse, options, BOTTOM_RIGHT=True, **pages)
    return laid_out_like(out, given, used), lse


def varlen_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    bias: Tensor | None,
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
    `bias` broadcasts to (N, H, max_seqlen_q, max_seqlen_k), its places counted in each sequence.
    Rows that no sequence owns get 0 and -inf: a captured graph may carry a padded tail.
    """
    layout = Layout.packed(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    given = q
    q, k, v = (near(x, 0) for x in (q, k, v))
    out = torch.zeros_like(q)
    lse = q.new_full((layout.heads, q.shape[0]), -float("inf"), dtype=torch.float32)
    used = q
    q, scale = positive_scale(q, scale)
    options = Options(
        seed, causal, window_left, window_right, softcap, scale, dropout_p,
        bias, alibi_slopes=alibi_slopes, sinks=sinks,
    )  # fmt: skip
    _launch_forward(layout, q, k, v, out, lse, options)
    return laid_out_like(out, given, used), lse


# ------------------------------------------------------------------------------------------------
# Specs
# ------------------------------------------------------------------------------------------------


def kernel_specs(family: str) -> Iterator[KernelSpec]:
    """Yield the launches of representative calls with the configs of an architecture family.

    Every head dim class in each demand of its configs, those that fill their tiles and those that
    do not, with the options spread over them; single precision once.
    """
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    cases = [(bf16, dim, "none", 0.0, "") for dim in (16, 32, 64, 128, 256)]
    cases += [(bf16, dim, "top_left", 0.0, "") for dim in (16, 32, 64, 128, 256)]
    cases += [(fp16, dim, "bottom_right", 0.0, "packed") for dim in (24, 40, 96, 200)]
    cases += [(bf16, 80, "none", 0.0, ""), (fp16, 40, "none", 0.0, "mask")]
    cases += [(bf16, dim, "top_left", 0.1, "lengths") for dim in (16, 32, 64, 128, 256)]
    cases += [(fp16, dim, "bottom_right", 0.1, "packed") for dim in (40, 80)]
    cases += [(bf16, dim, "none", 0.0, "bias") for dim in (16, 32, 64, 128, 256)]
    cases += [(bf16, dim, "none", 0.0, "packed bias") for dim in (64, 128)]
    cases += [(bf16, dim, "top_left", 0.0, "window") for dim in (32, 64, 128, 256)]
    cases += [(bf16, dim, "top_left", 0.0, "everything") for dim in (16, 32, 64, 128, 256)]
    cases += [(bf16, dim, "top_left", 0.1, "everything") for dim in (16, 32, 64, 128, 256)]
    cases += [(fp32, dim, "top_left", 0.1, "mask") for dim in (16, 32, 64, 128, 256)]
    cases += [(fp32, dim, "top_left", 0.1, "everything") for dim in (16, 64, 128, 256)]
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

    everything = kind == "everything"
    seed = meta(dtype=torch.int64) if dropout_p else None
    window = 256 if everything or kind == "window" else -1
    options = (seed, causal, window, -1, 30.0 if everything else 0.0, 0.125, dropout_p)
    if kind.startswith("packed"):
        q, k, boundaries = meta(4096, 4, dim), meta(4096, 2, dim), meta(5, dtype=torch.int32)
        bias = meta(1, 4, 2048, 2048) if kind == "packed bias" else None
        given = (boundaries, boundaries, 2048, 2048, bias, None, None, *options)
        out, lse = varlen_attention_forward(q, k, k, *given)
        varlen_attention_backward(out, lse, q, k, k, out, lse, *given, bias is not None)
        return
    q, k = meta(2, 4, 2048, dim), meta(2, 2 if everything else 4, 2048, dim)
    mask = meta(2, 2048, dtype=torch.bool) if kind == "mask" else None
    lengths = meta(2, dtype=torch.int32) if kind == "lengths" else None
    slopes = sinks = meta(4, dtype=torch.float32) if everything else None
    bias = meta(1, 4, 2048, 2048) if everything or kind == "bias" else None
    masks = (bias, mask, lengths, slopes, sinks)
    out, lse = attention_forward(q, k, k, *masks, *options)
    attention_backward(out, None, q, k, k, out, lse, *masks, *options, bias is not None)
