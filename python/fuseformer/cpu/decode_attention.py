"""Attention over a cache on the CPU, sequence by sequence, the heads of a group side by side."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..reference import visible, widened
from .attention_blocks import LOGITS_PER_BLOCK

# Rows of a key head that the fused routine takes at once: its mask stays within the size of the
# keys, and later rows see keys that earlier ones need not be multiplied with.
_ROWS = 512


class _Options(NamedTuple):
    """What a call asks for besides its tensors; a causal mask is a right window of 0."""

    window: tuple[int, int]
    softcap: float
    alibi_slopes: Tensor | None
    sinks: Tensor | None
    scale: float

    @property
    def fused(self) -> bool:
        """Whether PyTorch's flash routine has what is asked for."""
        return self.alibi_slopes is None and self.sinks is None and not self.softcap


def _gathered(cache: Tensor, pages: Tensor, first: int, end: int) -> Tensor:
    """Return the keys or values `first` to `end` of the sequence with these pages, (Hkv, C, D)."""
    size = cache.shape[2]
    start = first // size
    pages = pages[start : -(-end // size)].clamp(0, len(cache) - 1)
    return cache[pages].transpose(0, 1).flatten(1, 2)[:, first - start * size : end - start * size]


def _attend(
    q: Tensor, k: Tensor, v: Tensor, diagonal: int, options: _Options
) -> tuple[Tensor, Tensor]:
    """Return the output and lse of rows (H, R, D) of one sequence over keys (Hkv, C, D).

    The keys are those that some row sees; row i is aligned with key i + `diagonal`.
    """
    (heads, rows, dim), (kv_heads, keys, _) = q.shape, k.shape
    right = options.window[1]
    distance = hidden = None
    if rows > 1 or options.alibi_slopes is not None:
        distance = torch.arange(keys) - torch.arange(diagonal, diagonal + rows)[:, None]  # (R, C)
        if rows > 1 and options.window != (-1, -1):
            hidden = ~visible(distance, False, options.window)
    grouped = q.reshape(kv_heads, heads // kv_heads * rows, dim)
    # The fused routine has no lse for a row without a key, which only too few keys leave.
    if options.fused and keys and (right < 0 or diagonal + right >= 0):
        mask = None
        if hidden is not None:
            mask = torch.zeros(rows, keys, dtype=q.dtype).masked_fill_(hidden, -math.inf)
            mask = mask.repeat(heads // kv_heads, 1)[None, None]
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            grouped[None], k[None], v[None], 0.0, False, attn_mask=mask, scale=options.scale
        )
        return out.view(q.shape), lse.reshape(heads, rows)
    logits = widened(grouped) * options.scale @ widened(k).mT
    if options.softcap:
        logits.div_(options.softcap).tanh_().mul_(options.softcap)
    logits = logits.view(heads, rows, keys)
    if options.alibi_slopes is not None and distance is not None:
        logits -= options.alibi_slopes.to(logits.dtype)[:, None, None] * distance.abs()
    if hidden is not None:
        logits.masked_fill_(hidden, -math.inf)
    lse = torch.logsumexp(logits, -1)
    if options.sinks is not None:
        lse = torch.logaddexp(lse, options.sinks.to(lse.dtype)[:, None])
    logits.sub_(lse.masked_fill(lse == -math.inf, 0.0)[..., None]).exp_()
    return (logits.view(*grouped.shape[:2], keys) @ widened(v)).view(q.shape), lse


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
    """Return the output (B, H, Sq, D) and lse (B, H, Sq) of `fuseformer.decode_attention`."""
    batch, heads, sq, _ = q.shape
    kv_heads, capacity = k_cache.shape[1:3]
    if block_table is not None:
        capacity *= block_table.shape[1] if len(k_cache) else 0
    options = _Options((window_left, window_right), softcap, alibi_slopes, sinks, scale)
    out = torch.empty_like(q)
    lse = torch.empty(batch, heads, sq, dtype=widened(q[:0]).dtype)
    ends = cache_lengths.clamp(0, capacity).tolist() if sq and heads else []
    for b, end in enumerate(ends):
        diagonal = end - sq
        begin = max(0, diagonal - window_left) if window_left >= 0 else 0
        if block_table is None:
            k, v = (cache[b, :, begin:end] for cache in (k_cache, v_cache))
        else:
            k, v = (_gathered(cache, block_table[b], begin, end) for cache in (k_cache, v_cache))
        step = max(1, _ROWS * kv_heads // heads)
        if not options.fused:
            step = min(step, max(8, LOGITS_PER_BLOCK // (heads * max(1, end - begin))))
        for row in range(0, sq, step):
            stop = min(row + step, sq)
            first = max(begin, diagonal + row - window_left) if window_left >= 0 else begin
            last = end if window_right < 0 else min(end, diagonal + stop + window_right)
            seen = slice(first - begin, max(first, last) - begin)
            out[b, :, row:stop], lse[b, :, row:stop] = _attend(
                q[b, :, row:stop], k[:, seen], v[:, seen], diagonal + row - first, options
            )
    return out, lse
