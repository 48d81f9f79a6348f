"""Attention in plain, differentiable PyTorch: dense, packed, and over a cache."""

import math

import torch
from torch import Tensor

from ..philox import dropout_scale, keep_mask
from .numerics import widened

#: ALiBi's slopes are bounded by it in float32: times any distance it is finite there, and no
#: softmax tells steeper ones apart.
STEEPEST_SLOPE = 2.0**96


def diagonal_offset(
    alignment: str, queries: int, keys: int, key_lengths: Tensor | None
) -> int | Tensor:
    """Return how far right of the main one the diagonal lies: query i is aligned with key i + it.

    Bottom-right, the last query is aligned with the last key that counts: of the tensor, or with
    `key_lengths` (B,) of each batch entry, and then the result is (B, 1, 1, 1). Lengths are bounded
    by `keys`. A key that a padding mask hides counts.
    """
    if alignment != "bottom_right":
        return 0
    if key_lengths is None:
        return keys - queries
    return key_lengths.long().clamp(0, keys)[:, None, None, None] - queries


def visible(distance: Tensor, causal: bool, window: tuple[int, int]) -> Tensor:
    """Return which keys a query may see by position alone.

    `distance` (..., R, C) is how far a key lies to the right of the diagonal. A window side of -1
    is unbounded.
    """
    seen = torch.ones_like(distance, dtype=torch.bool)
    left, right = window
    if causal:
        seen &= distance <= 0
    if left >= 0:
        seen &= distance >= -left
    if right >= 0:
        seen &= distance <= right
    return seen


def without_padding(
    x: Tensor, key_padding_mask: Tensor | None, key_lengths: Tensor | None
) -> Tensor:
    """Return keys or values (B, Hkv, Sk, D) with zeros where they are padding.

    What a cache or a buffer holds there may be NaN, of which 0 times is NaN.
    """
    if key_padding_mask is not None:
        x = x.masked_fill(key_padding_mask[:, None, :, None], 0.0)
    if key_lengths is not None:
        beyond = torch.arange(x.shape[2], device=x.device) >= key_lengths[:, None]  # (B, Sk)
        x = x.masked_fill(beyond[:, None, :, None], 0.0)
    return x


def capped_logits(q: Tensor, k: Tensor, scale: float, softcap: float) -> Tensor:
    """Return ``q @ k.T * scale`` (B, H, R, C), capped by a `softcap` other than 0.

    In half precision they are rounded as plain PyTorch's are, but not before they are scaled:
    products may be past what it holds.
    """
    logits = widened(q) @ widened(k).transpose(-2, -1) * scale
    if widened(q[:0]).dtype != q.dtype:
        most = torch.finfo(q.dtype).max
        logits = widened(logits.clamp(-most, most).to(q.dtype))
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def add_bias_and_masks(
    logits: Tensor,
    *,
    rows: range | Tensor,
    columns: range,
    offset: int | Tensor,
    causal: bool,
    key_padding_mask: Tensor | None,
    key_lengths: Tensor | None,
    bias: Tensor | None,
    window: tuple[int, int],
    alibi_slopes: Tensor | None,
) -> Tensor:
    """Return `logits` (B, H, R, C) with bias and ALiBi added and -inf where a key is not visible.

    The logits are those of the query positions `rows` and the key positions `columns`; masks and
    `bias` are given for all positions and sliced here, except that where `rows` is a tensor (R,) of
    chosen positions `bias` holds just those. `offset` is that of `diagonal_offset`.
    """
    if bias is not None:
        bias = bias[(None,) * (4 - bias.ndim)]
        if bias.shape[-2] > 1 and isinstance(rows, range):
            bias = bias[..., rows.start : rows.stop, :]
        if bias.shape[-1] > 1:
            bias = bias[..., columns.start : columns.stop]
        logits = logits + bias
    if isinstance(rows, Tensor):
        row = rows
    else:
        row = torch.arange(rows.start, rows.stop, device=logits.device)
    column = torch.arange(columns.start, columns.stop, device=logits.device)
    distance = column - (row[:, None] + offset)  # (R, C) or (B, 1, R, C), positive: the future
    if alibi_slopes is not None:
        slopes = alibi_slopes.to(logits.dtype)
        if slopes.dtype == torch.float32:
            slopes = slopes.clamp(-STEEPEST_SLOPE, STEEPEST_SLOPE)
        logits = logits - slopes[:, None, None] * distance.abs()
    if causal or window != (-1, -1):
        logits = logits.masked_fill(~visible(distance, causal, window), -math.inf)
    if key_padding_mask is not None:
        padding = key_padding_mask[:, None, None, columns.start : columns.stop]
        logits = logits.masked_fill(padding, -math.inf)
    if key_lengths is not None:
        padding = column >= key_lengths[:, None]
        logits = logits.masked_fill(padding[:, None, None, :], -math.inf)
    return logits


def softmax_with_lse(logits: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the probabilities (..., H, R, Sk) of `logits` and their log-sum-exp (..., H, R).

    A row that sees nothing has probabilities 0 and lse -inf, with zero gradients; `sinks` (H,) adds
    a logit per head to the denominator alone.
    """
    if logits.shape[-1]:
        top = logits.detach().amax(-1, keepdim=True)
    else:
        top = logits.new_full((*logits.shape[:-1], 1), -math.inf)
    if sinks is not None:
        sink = sinks.to(logits.dtype)[:, None, None]
        top = torch.maximum(top, sink.detach())
    top = torch.where(top == -math.inf, torch.zeros_like(top), top)
    weights = torch.exp(logits - top)
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sink - top)
    empty = total == 0
    total = torch.where(empty, torch.ones_like(total), total)
    lse = (torch.log(total) + top).masked_fill(empty, -math.inf)
    return weights / total, lse.squeeze(-1)


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """Return key or value heads (B, Hkv, S, D) repeated to `heads` query heads."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: str = "none",
    key_padding_mask: Tensor | None = None,
    key_lengths: Tensor | None = None,
    bias: Tensor | None = None,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    first_batch: int = 0,
) -> tuple[Tensor, Tensor]:
    """Return the output (B, H, Sq, D) of scaled dot-product attention and its lse (B, H, Sq).

    Arguments are those of `fuseformer.attention` after its checks: `causal` is "none", "top_left"
    or "bottom_right", a `softcap` of 0 is off. `first_batch` is what the dropout mask calls batch
    0.

    Source: Vaswani et al., "Attention Is All You Need", 2017, equation 1.
    """
    batch, heads, sq, head_dim = q.shape
    k, v = (repeat_heads(without_padding(x, key_padding_mask, key_lengths), heads) for x in (k, v))
    sk = k.shape[2]
    logits = capped_logits(q, k, 1 / math.sqrt(head_dim) if scale is None else scale, softcap)
    logits = add_bias_and_masks(
        logits,
        rows=range(sq),
        columns=range(sk),
        offset=diagonal_offset(causal, sq, sk, key_lengths),
        causal=causal != "none",
        key_padding_mask=key_padding_mask,
        key_lengths=key_lengths,
        bias=bias,
        window=window,
        alibi_slopes=alibi_slopes,
    )
    weights, lse = softmax_with_lse(logits, sinks)
    if dropout_p > 0:
        assert seed is not None
        batches = range(first_batch, first_batch + batch)
        keep = keep_mask(seed, dropout_p, batches, range(heads), range(sq), sk)
        weights = weights * keep * dropout_scale(dropout_p)
    return weights.to(q.dtype) @ v, lse


def bias_of_sequence(bias: Tensor, n: int, rows: slice, columns: slice) -> Tensor:
    """Return the part (1, H, Sq, Sk) of a packed call's bias that belongs to sequence `n`.

    `rows` and `columns` are the sequence's places in the packed tensors. Dimensions of size 1 stay.
    """
    bias = bias[(None,) * (4 - bias.ndim)]
    bias = bias[n : n + 1] if bias.shape[0] > 1 else bias
    bias = bias[:, :, : rows.stop - rows.start] if bias.shape[2] > 1 else bias
    return bias[..., : columns.stop - columns.start] if bias.shape[3] > 1 else bias


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    causal: str = "none",
    bias: Tensor | None = None,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the output (Tq, H, D) of attention within each packed sequence and its lse (H, Tq).

    `q` is (Tq, H, D), `k` and `v` (Tk, Hkv, D); sequence n owns the rows ``cu_seqlens[n]`` to
    ``cu_seqlens[n + 1]`` of each. `bias` broadcasts to (N, H, longest queries, longest keys).
    """
    outs, lses = [q[:0]], [widened(q.new_zeros(q.shape[1], 0))]
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for n in range(len(starts_q) - 1):
        rows = slice(starts_q[n], starts_q[n + 1])
        columns = slice(starts_k[n], starts_k[n + 1])
        out, lse = attention(
            q[rows].transpose(0, 1)[None],
            k[columns].transpose(0, 1)[None],
            v[columns].transpose(0, 1)[None],
            causal=causal,
            bias=None if bias is None else bias_of_sequence(bias, n, rows, columns),
            window=window,
            softcap=softcap,
            alibi_slopes=alibi_slopes,
            sinks=sinks,
            scale=scale,
            dropout_p=dropout_p,
            seed=seed,
            first_batch=n,
        )
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    unowned = max(0, q.shape[0] - starts_q[-1])  # rows that no sequence owns get 0
    outs.append(q.new_zeros(unowned, *q.shape[1:]))
    lses.append(lses[0].new_full((q.shape[1], unowned), -math.inf))
    return torch.cat(outs), torch.cat(lses, dim=1)


def cached_rows(cache: Tensor, block_table: Tensor | None) -> Tensor:
    """Return a cache as (B, Hkv, capacity, D), its pages (pages, Hkv, size, D) put in order.

    A page that does not exist is taken as the nearest one that does.
    """
    if block_table is None:
        return cache
    if cache.shape[0] == 0:
        return cache.new_zeros(len(block_table), cache.shape[1], 0, cache.shape[3])
    pages = block_table.long().clamp(0, cache.shape[0] - 1)
    return cache[pages].transpose(1, 2).flatten(2, 3)


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_lengths: Tensor,
    *,
    block_table: Tensor | None = None,
    causal: bool = True,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return the output (B, H, Sq, D) of new queries over a cache, and its lse (B, H, Sq).

    Arguments are those of `fuseformer.decode_attention` after its checks: the last query is aligned
    with the last key that counts, `causal` or not. What lies past a length may be NaN.
    """
    heads, sq = q.shape[1:3]
    k, v = cached_rows(k_cache, block_table), cached_rows(v_cache, block_table)
    capacity = k.shape[2]
    k, v = (repeat_heads(without_padding(x, None, cache_lengths), heads) for x in (k, v))
    logits = add_bias_and_masks(
        capped_logits(q, k, scale, softcap),
        rows=range(sq),
        columns=range(capacity),
        offset=diagonal_offset("bottom_right", sq, capacity, cache_lengths),
        causal=causal,
        key_padding_mask=None,
        key_lengths=cache_lengths,
        bias=None,
        window=window,
        alibi_slopes=alibi_slopes,
    )
    weights, lse = softmax_with_lse(logits, sinks)
    return weights.to(q.dtype) @ v, lse
