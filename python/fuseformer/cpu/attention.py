"""Attention on the CPU: PyTorch's flash routine, or row blocks of plain maths."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..philox import dropout_scale, keep_mask
from ..reference import (
    add_bias_and_masks,
    capped_logits,
    repeat_heads,
    softmax_with_lse,
    widened,
)

# Logits that a row block may hold: 8 MiB of float32, so that a block lives in the outer caches.
_LOGITS_PER_BLOCK = 1 << 21


class _Options(NamedTuple):
    """What an attention call asks for besides its three tensors."""

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


def _served_by_flash(q: Tensor, sk: int, options: _Options) -> bool:
    """Return whether PyTorch's flash routine computes this call.

    It takes a bias in the dtype of `q` alone; a wider one would be rounded.
    """
    sq = q.shape[2]
    return (
        sq > 0
        and sk > 0
        and (options.bias is None or options.bias.dtype == q.dtype)
        and options.dropout_p == 0
        and options.window == (-1, -1)
        and options.softcap == 0
        and options.alibi_slopes is None
        and options.sinks is None
        and (options.causal != "bottom_right" or sq == sk)
    )


def _additive_mask(q: Tensor, sk: int, options: _Options) -> Tensor | None:
    """Return bias and padding as one additive mask that broadcasts to (B, H, Sq, Sk), or None."""
    mask = None
    padding = options.key_padding_mask
    if options.key_lengths is not None:
        beyond = torch.arange(sk) >= options.key_lengths[:, None]  # (B, Sk)
        padding = beyond if padding is None else padding | beyond
    if padding is not None:
        mask = torch.zeros(padding.shape, dtype=q.dtype).masked_fill_(padding, -math.inf)
        mask = mask[:, None, None, :]
    if options.bias is not None:
        mask = options.bias if mask is None else options.bias + mask
    return mask


def _trim_keys(k: Tensor, v: Tensor, options: _Options) -> tuple[Tensor, Tensor, _Options]:
    """Drop the keys that lie beyond every length: they are padding for each sequence."""
    if options.key_lengths is None or options.causal == "bottom_right" or not len(k):
        return k, v, options
    longest = max(1, min(int(options.key_lengths.max()), k.shape[2]))
    if longest == k.shape[2]:
        return k, v, options
    mask, bias = options.key_padding_mask, options.bias
    if mask is not None:
        mask = mask[:, :longest]
    if bias is not None and bias.shape[-1] > 1:
        bias = bias[..., :longest]
    return k[:, :, :longest], v[:, :, :longest], options._replace(key_padding_mask=mask, bias=bias)


def _row_blocks(batch: int, heads: int, sq: int, sk: int) -> list[range]:
    """Return blocks of query rows whose logits fit the budget; multiples of 16 for the mask."""
    step = max(16, _LOGITS_PER_BLOCK // max(1, batch * heads * sk) // 16 * 16)
    return [range(start, min(start + step, sq)) for start in range(0, sq, step)]


def _visible_columns(rows: range, sq: int, sk: int, options: _Options) -> tuple[range, int]:
    """Return the keys that some row of a block may see by position, and the diagonal's offset."""
    offset = sk - sq if options.causal == "bottom_right" else 0
    left, right = options.window
    if options.causal != "none":
        right = 0 if right < 0 else min(right, 0)
    start = 0 if left < 0 else min(max(0, rows.start + offset - left), sk)
    stop = sk if right < 0 else min(max(start, rows.stop + offset + right), sk)
    return range(start, stop), offset


def _masked_logits(
    capped: Tensor, rows: range, columns: range, offset: int, options: _Options
) -> Tensor:
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


def _dropout_factors(
    options: _Options, batch: int, heads: int, rows: range, columns: range
) -> Tensor | None:
    """Return the factors (B, H, R, C) that dropout multiplies probabilities with, or None."""
    if options.dropout_p == 0:
        return None
    assert options.seed is not None
    batches = range(batch) if options.batches is None else options.batches
    keep = keep_mask(options.seed, options.dropout_p, batches, range(heads), rows, columns.stop)
    return keep[..., columns.start :] * dropout_scale(options.dropout_p)


def _forward(q: Tensor, k: Tensor, v: Tensor, options: _Options) -> tuple[Tensor, Tensor]:
    batch, heads, sq, _ = q.shape
    k, v, options = _trim_keys(k, v, options)
    sk = k.shape[2]
    if _served_by_flash(q, sk, options):
        mask = _additive_mask(q, sk, options)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, options.causal != "none", attn_mask=mask, scale=options.scale
        )
        lse = lse.contiguous()
        if mask is not None:
            # The routine reports lse 0 for a row without a visible key; a mask alone can hide all.
            blind = (mask == -math.inf).all(-1)
            if options.causal != "none":
                hidden = (mask == -math.inf).cummin(-1).values  # True up to the first visible key
                hidden = hidden.expand(*hidden.shape[:2], sq, sk)
                blind = hidden.diagonal(dim1=-2, dim2=-1)
                if sq > sk:
                    tail = hidden[..., sk:, -1]
                    blind = torch.cat([blind, tail], -1)
            lse = lse.masked_fill(blind, -math.inf)
        return out, lse
    out = torch.empty_like(q)
    lse = torch.empty(batch, heads, sq, dtype=widened(q[:0]).dtype)
    k, v = repeat_heads(k, heads), repeat_heads(v, heads)
    for rows in _row_blocks(batch, heads, sq, sk):
        columns, offset = _visible_columns(rows, sq, sk, options)
        block = slice(rows.start, rows.stop)
        seen = slice(columns.start, columns.stop)
        logits = capped_logits(q[:, :, block], k[:, :, seen], options.scale, options.softcap)
        logits = _masked_logits(logits, rows, columns, offset, options)
        weights, lse[:, :, block] = softmax_with_lse(logits, options.sinks)
        factors = _dropout_factors(options, batch, heads, rows, columns)
        if factors is not None:
            weights *= factors
        out[:, :, block] = weights.to(q.dtype) @ v[:, :, seen]
    return out, lse


def _reduced_to(gradient: Tensor, shape: torch.Size) -> Tensor:
    """Return `gradient` summed over the dimensions along which `shape` was broadcast."""
    leading = gradient.ndim - len(shape)
    dims = [*range(leading)]
    dims += [
        leading + i for i, n in enumerate(shape) if n == 1 and gradient.shape[leading + i] != 1
    ]
    return (gradient.sum(dims, keepdim=True) if dims else gradient).reshape(shape)


def _backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    options: _Options,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    full_k, (batch, heads, sq, _) = k, q.shape
    if not bias_grad:
        k, v, options = _trim_keys(k, v, options)
    sk, kv_heads = k.shape[2], k.shape[1]
    if _served_by_flash(q, sk, options) and dlse is None and not bias_grad:
        mask = _additive_mask(q, sk, options)
        # A row without a visible key has lse -inf; with 0 its probabilities come out as exp(-inf).
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout,
            q,
            k,
            v,
            out,
            lse.masked_fill(lse == -math.inf, 0.0),
            0.0,
            options.causal != "none",
            attn_mask=mask,
            scale=options.scale,
        )
        return dq, _padded(dk, full_k), _padded(dv, full_k), None, None
    k, v = repeat_heads(k, heads), repeat_heads(v, heads)
    dq = torch.empty_like(q)
    dk, dv = (torch.zeros(k.shape, dtype=lse.dtype) for _ in range(2))
    dbias = None
    if bias_grad and options.bias is not None:
        dbias = torch.zeros(options.bias.shape, dtype=lse.dtype)
    masses = None if options.sinks is None else torch.zeros_like(options.sinks, dtype=lse.dtype)
    finite_lse = lse.masked_fill(lse == -math.inf, 0.0)[..., None]
    for rows in _row_blocks(batch, heads, sq, sk):
        columns, offset = _visible_columns(rows, sq, sk, options)
        block = slice(rows.start, rows.stop)
        seen = slice(columns.start, columns.stop)
        q_block, dout_block, k_seen = q[:, :, block], dout[:, :, block], k[:, :, seen]
        capped = capped_logits(q_block, k_seen, options.scale, options.softcap)
        logits = _masked_logits(capped, rows, columns, offset, options)
        weights = torch.exp(logits - finite_lse[:, :, block])  # (B, H, R, C)
        dweights = widened(dout_block) @ widened(v[:, :, seen]).transpose(-2, -1)
        factors = _dropout_factors(options, batch, heads, rows, columns)
        dropped = weights
        if factors is not None:
            dropped, dweights = weights * factors, dweights * factors
        dv[:, :, seen] += dropped.to(q.dtype).transpose(-2, -1) @ dout_block
        # The row is whole here, so its mean gradient needs no detour over the rounded output.
        delta = (weights * dweights).sum(-1, keepdim=True)  # (B, H, R, 1)
        if dlse is not None:
            delta = delta - dlse[:, :, block, None]
        if masses is not None and options.sinks is not None:
            sink = torch.exp(options.sinks.to(lse.dtype)[:, None, None] - finite_lse[:, :, block])
            masses -= (sink * delta).sum((0, 2, 3))
        dlogits = weights * (dweights - delta)
        if dbias is not None and options.bias is not None:
            part = dbias[..., block, :] if dbias.shape[-2] > 1 else dbias
            part = part[..., seen] if dbias.shape[-1] > 1 else part
            part += _reduced_to(dlogits, part.shape)
        if options.softcap:
            dlogits = dlogits * (1 - (capped / options.softcap) ** 2)
        dlogits = (dlogits * options.scale).to(q.dtype)
        dq[:, :, block] = dlogits @ k_seen
        dk[:, :, seen] += dlogits.transpose(-2, -1) @ q_block
    dsinks = None
    if masses is not None and options.sinks is not None:
        dsinks = masses.to(options.sinks.dtype)
    groups = (batch, kv_heads, heads // kv_heads, sk, q.shape[-1])
    dk, dv = (_padded(g.view(groups).sum(2).to(q.dtype), full_k) for g in (dk, dv))
    if dbias is not None and options.bias is not None:
        dbias = dbias.to(options.bias.dtype)
    return dq, dk, dv, dbias, dsinks


def _padded(gradient: Tensor, full: Tensor) -> Tensor:
    """Return `gradient` with zero rows appended for the keys that `_trim_keys` dropped."""
    missing = full.shape[2] - gradient.shape[2]
    return torch.nn.functional.pad(gradient, (0, 0, 0, missing)) if missing else gradient


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
    """Return the output (B, H, Sq, D) and lse (B, H, Sq) of dense attention."""
    window = (window_left, window_right)
    options = _Options(
        bias,
        key_padding_mask,
        key_lengths,
        alibi_slopes,
        sinks,
        seed,
        causal,
        window,
        softcap,
        scale,
        dropout_p,
    )
    return _forward(q, k, v, options)


def attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
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
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return the gradients of q, k, v, and of the bias and the sinks where there are any."""
    window = (window_left, window_right)
    options = _Options(
        bias,
        key_padding_mask,
        key_lengths,
        alibi_slopes,
        sinks,
        seed,
        causal,
        window,
        softcap,
        scale,
        dropout_p,
    )
    return _backward(dout, dlse, q, k, v, out, lse, options, bias_grad)
