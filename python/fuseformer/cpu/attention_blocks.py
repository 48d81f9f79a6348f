"""Attention on the CPU as plain maths over blocks of query rows, for what no fused routine takes.

The logits of one block exist at a time and stay in the caches; passes over them are in place where
the maths allows it.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..philox import dropout_scale
from ..reference import add_bias_and_masks, repeat_heads, widened
from .dropout import keep_mask

# Logits that a row block may hold: 4 MiB of float32, so that a block lives in the outer caches.
LOGITS_PER_BLOCK = 1 << 20


class Options(NamedTuple):
    """What an attention call asks for besides its three tensors.

    `bias` has four dimensions; `batches` are the sequences' numbers for dropout, 0 up unless given.
    """

    bias: Tensor | None
    key_padding_mask: Tensor | None
    key_lengths: Tensor | None
    alibi_slopes: Tensor | None
    sinks: Tensor | None
    seed: Tensor | None
    causal: str
    window: tuple[int, int]
    softcap: float
    scale: float
    dropout_p: float
    batches: Sequence[int] | None = None


def _row_blocks(batch: int, heads: int, sq: int, sk: int) -> list[range]:
    """Return blocks of query rows whose logits fit the budget; multiples of 16 for the mask."""
    step = max(16, LOGITS_PER_BLOCK // max(1, batch * heads * sk) // 16 * 16)
    return [range(start, min(start + step, sq)) for start in range(0, sq, step)]


def _visible_columns(rows: range, sq: int, sk: int, options: Options) -> tuple[range, int]:
    """Return the keys that some row of a block may see by position, and the diagonal's offset."""
    offset = sk - sq if options.causal == "bottom_right" else 0
    left, right = options.window
    if options.causal != "none":
        right = 0 if right < 0 else min(right, 0)
    start = 0 if left < 0 else min(max(0, rows.start + offset - left), sk)
    stop = sk if right < 0 else min(max(start, rows.stop + offset + right), sk)
    return range(start, stop), offset


def _logits(q: Tensor, k: Tensor, options: Options) -> Tensor:
    """Return fresh logits (B, H, R, C) with the softcap, before bias and masks.

    Products of half-precision `q` and `k` may be past what half precision holds, and would be
    rounded before the softmax: they are taken in the dtype of sums.
    """
    logits = widened(q) * options.scale @ k.mT
    if options.softcap:
        logits.div_(options.softcap).tanh_().mul_(options.softcap)
    return logits


def _masked(capped: Tensor, rows: range, columns: range, offset: int, options: Options) -> Tensor:
    return add_bias_and_masks(
        capped,
        rows=rows,
        columns=columns,
        offset=offset,
        causal=options.causal != "none",
        key_padding_mask=options.key_padding_mask,
        key_lengths=options.key_lengths,
        bias=options.bias,
        window=options.window,
        alibi_slopes=options.alibi_slopes,
    )


def _softmax(logits: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the probabilities (B, H, R, C) of `logits` and their log-sum-exp (B, H, R).

    The largest probability is 1 / sum(exp(logits - top)): the sum needs no pass of its own.
    """
    if not logits.shape[-1]:
        lse = logits.new_full(logits.shape[:-1], -math.inf)
        return logits, lse if sinks is None else torch.maximum(lse, sinks.to(lse.dtype)[:, None])
    top = logits.amax(-1)
    weights = torch.softmax(logits, -1)
    blind = top == -math.inf
    lse = top - weights.amax(-1).log_()
    if blind.any():
        weights.masked_fill_(blind[..., None], 0.0)
        lse.masked_fill_(blind, -math.inf)
    if sinks is not None:
        total = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
        weights.mul_(torch.exp(lse - total.masked_fill(total == -math.inf, 0.0))[..., None])
        lse = total
    return weights, lse


def _dropout_factors(
    options: Options, batch: int, heads: int, rows: range, columns: range, dtype: torch.dtype
) -> Tensor | None:
    """Return the factors (B, H, R, C) that dropout multiplies probabilities with, or None."""
    if options.dropout_p == 0:
        return None
    assert options.seed is not None
    batches = range(batch) if options.batches is None else options.batches
    keep = keep_mask(options.seed, options.dropout_p, batches, range(heads), rows, columns)
    return keep.to(dtype).mul_(dropout_scale(options.dropout_p))


def forward(q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """Return the output (B, H, Sq, D) and the lse (B, H, Sq)."""
    batch, heads, sq, _ = q.shape
    sk = k.shape[2]
    out = torch.empty_like(q)
    lse = torch.empty(batch, heads, sq, dtype=widened(q[:0]).dtype)
    k, v = repeat_heads(widened(k), heads), repeat_heads(v, heads)
    for rows in _row_blocks(batch, heads, sq, sk):
        columns, offset = _visible_columns(rows, sq, sk, options)
        block = slice(rows.start, rows.stop)
        seen = slice(columns.start, columns.stop)
        logits = _logits(q[:, :, block], k[:, :, seen], options)
        logits = _masked(logits, rows, columns, offset, options)
        weights, lse[:, :, block] = _softmax(logits, options.sinks)
        factors = _dropout_factors(options, batch, heads, rows, columns, lse.dtype)
        if factors is not None:
            weights.mul_(factors)
        out[:, :, block] = weights.to(q.dtype) @ v[:, :, seen]
    return out, lse


def _reduced_to(gradient: Tensor, shape: torch.Size) -> Tensor:
    """Return `gradient` summed over the dimensions along which `shape` was broadcast."""
    dims = [i for i, n in enumerate(shape) if n == 1 and gradient.shape[i] != 1]
    return gradient.sum(dims, keepdim=True) if dims else gradient


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    options: Options,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return the gradients of q, k, v, bias and sinks; the last two in the dtype of `lse`."""
    batch, heads, sq, dim = q.shape
    sk, kv_heads, dtype = k.shape[2], k.shape[1], k.dtype
    dq = torch.empty_like(q)
    if dtype == torch.float16:  # gradients of logits may be past what it holds, those of q are not
        q, k, dout = widened(q), widened(k), widened(dout)
    narrow_k, k, v = (repeat_heads(x, heads) for x in (k, widened(k), widened(v)))
    dk, dv = (torch.zeros(k.shape, dtype=lse.dtype) for _ in range(2))
    bias, sinks = options.bias if bias_grad else None, options.sinks
    dbias = None if bias is None else torch.zeros(bias.shape, dtype=lse.dtype)
    dsinks = None if sinks is None else torch.zeros(sinks.shape, dtype=lse.dtype)
    finite_lse = lse.masked_fill(lse == -math.inf, 0.0)[..., None]
    for rows in _row_blocks(batch, heads, sq, sk):
        columns, offset = _visible_columns(rows, sq, sk, options)
        block = slice(rows.start, rows.stop)
        seen = slice(columns.start, columns.stop)
        q_block, dout_block = q[:, :, block], dout[:, :, block]
        weights = _logits(q_block, k[:, :, seen], options)
        slope = None
        if options.softcap:
            slope = (weights / options.softcap).square_().neg_().add_(1)
        weights = _masked(weights, rows, columns, offset, options)
        # Not from the lse, which may be as coarse as the logits are large: the row is whole here.
        weights, _ = _softmax(weights, sinks)  # (B, H, R, C)
        dweights = widened(dout_block) @ v[:, :, seen].mT
        factors = _dropout_factors(options, batch, heads, rows, columns, lse.dtype)
        dropped = weights
        if factors is not None:
            dweights.mul_(factors)
            dropped = factors.mul_(weights)
        dv[:, :, seen] += dropped.to(dout.dtype).mT @ dout_block
        # Its mean gradient needs no detour over the rounded output, either.
        delta = (weights * dweights).sum(-1, keepdim=True)  # (B, H, R, 1)
        if dlse is not None:
            delta = delta - dlse[:, :, block, None]
        if dsinks is not None and sinks is not None:
            mass = torch.exp(sinks.to(lse.dtype)[:, None, None] - finite_lse[:, :, block])
            dsinks -= (mass * delta).sum((0, 2, 3))
        dlogits = dweights.sub_(delta).mul_(weights)
        if dbias is not None:
            part = dbias[..., block, :] if dbias.shape[-2] > 1 else dbias
            part = part[..., seen] if dbias.shape[-1] > 1 else part
            part += _reduced_to(dlogits, part.shape)
        if slope is not None:
            dlogits.mul_(slope)
        narrow = dlogits.mul_(options.scale).to(q.dtype)
        dq[:, :, block] = narrow @ narrow_k[:, :, seen]
        dk[:, :, seen] += narrow.mT @ q_block
    groups = (batch, kv_heads, heads // kv_heads, sk, dim)
    dk, dv = (
        g.view(groups).sum(2).to(dtype) if kv_heads != heads else g.to(dtype) for g in (dk, dv)
    )
    return dq, dk, dv, dbias, dsinks
