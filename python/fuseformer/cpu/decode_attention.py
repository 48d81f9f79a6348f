"""Attention over a cache on the CPU, sequence by sequence, the heads of a group side by side."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..reference import widened


class _Options(NamedTuple):
    """What a call asks for besides its tensors, as in the op."""

    window_left: int
    softcap: float
    alibi_slopes: Tensor | None
    sinks: Tensor | None
    scale: float


def _gathered(cache: Tensor, pages: Tensor, first: int, end: int) -> Tensor:
    """Return the keys or values `first` to `end` of the sequence with these pages, (Hkv, C, D)."""
    size = cache.shape[2]
    start = first // size
    pages = pages[start : -(-end // size)].clamp(0, len(cache) - 1)
    return cache[pages].transpose(0, 1).flatten(1, 2)[:, first - start * size : end - start * size]


def _attend(q: Tensor, k: Tensor, v: Tensor, sq: int, options: _Options) -> tuple[Tensor, Tensor]:
    """Return the output and lse of one sequence's rows (Hkv, R, D), query heads times queries.

    The keys (Hkv, C, D) are those that some query sees, up to the last query's own.
    """
    slopes, sinks, left, keys = options.alibi_slopes, options.sinks, options.window_left, k.shape[1]
    distance = hidden = None
    if sq > 1 or slopes is not None:
        distance = torch.arange(keys - sq, keys)[:, None] - torch.arange(keys)  # (Sq, C)
        if sq > 1:
            hidden = distance < 0
            hidden = hidden | (distance > left) if left >= 0 else hidden
    # The fused routine has no lse for a row without a key, which only too few keys leave.
    if slopes is None and sinks is None and not options.softcap and keys >= max(sq, 1):
        mask = None
        if hidden is not None:
            mask = torch.zeros(sq, keys, dtype=q.dtype).masked_fill_(hidden, -math.inf)
            mask = mask.repeat(q.shape[1] // sq, 1)[None, None]
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q[None], k[None], v[None], 0.0, False, attn_mask=mask, scale=options.scale
        )
        return out[0], lse[0]
    logits = widened(q) * options.scale @ widened(k).mT
    if options.softcap:
        logits.div_(options.softcap).tanh_().mul_(options.softcap)
    logits = logits.view(len(q) * q.shape[1] // sq, sq, keys)  # (H, Sq, C)
    if slopes is not None and distance is not None:
        logits -= slopes.to(logits.dtype)[:, None, None] * distance.abs()
    if hidden is not None:
        logits.masked_fill_(hidden, -math.inf)
    lse = torch.logsumexp(logits, -1)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
    logits.sub_(lse.masked_fill(lse == -math.inf, 0.0)[..., None]).exp_()
    return logits.view(*q.shape[:2], keys) @ widened(v), lse


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_lengths: Tensor,
    block_table: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    window_left: int,
    softcap: float,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return the output (B, H, Sq, D) and lse (B, H, Sq) of `fuseformer.decode_attention`."""
    batch, heads, sq, dim = q.shape
    kv_heads, capacity = k_cache.shape[1:3]
    if block_table is not None:
        capacity *= block_table.shape[1] if len(k_cache) else 0
    options = _Options(window_left, softcap, alibi_slopes, sinks, scale)
    out = torch.empty_like(q)
    lse = torch.empty(batch, heads, sq, dtype=widened(q[:0]).dtype)
    ends = cache_lengths.clamp(0, capacity).tolist() if sq else []
    for b, end in enumerate(ends):
        first = max(0, end - sq - window_left) if window_left >= 0 else 0
        if block_table is None:
            k, v = (cache[b, :, first:end] for cache in (k_cache, v_cache))
        else:
            k, v = (_gathered(cache, block_table[b], first, end) for cache in (k_cache, v_cache))
        rows = q[b].reshape(kv_heads, heads // kv_heads * sq, dim)
        found, total = _attend(rows, k, v, sq, options)
        out[b], lse[b] = found.reshape(heads, sq, dim), total.reshape(heads, sq)
    return out, lse
