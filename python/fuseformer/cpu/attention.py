"""Attention on the CPU: PyTorch's flash routine where it serves, else blocks of plain maths.

Sequences of a padded batch are computed apart, each up to its last visible key, where that saves
more than the calls cost.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reference import widened, without_padding
from . import attention_blocks
from .attention_blocks import Options

# Multiply-adds of one sequence above which it is worth a call of its own (about 0.1 ms).
_WORK_OF_A_CALL = 1 << 22

_FEW_KEYS = 4

# From here on neighbouring numbers in float32 are 1/64 apart, and weights from an lse wrong by as
# much as bfloat16 rounds them twice.
_COARSE = 2.0**17


class _Part(NamedTuple):
    """Sequences computed in one call: which, how many of the keys, and their options."""

    batch: slice
    keys: int
    options: Options


def _taken(options: Options, batch: slice, keys: int, seen: Tensor | None) -> Options:
    """Return the options of the sequences `batch` and their first `keys` keys, those `seen`."""
    bias = options.bias
    if bias is not None:
        bias = bias[batch] if bias.shape[0] > 1 else bias
        bias = bias[..., :keys] if bias.shape[-1] > 1 else bias
    return options._replace(
        bias=bias,
        key_padding_mask=None if seen is None else ~seen[batch, :keys],
        key_lengths=None,
        batches=(range(batch.stop) if options.batches is None else options.batches)[batch],
    )


def _parts(q: Tensor, sk: int, options: Options) -> list[_Part]:
    """Return how to divide a batch so that little is computed for keys that are padding."""
    batch, heads, sq, dim = q.shape
    mask, lengths = options.key_padding_mask, options.key_lengths
    everything = slice(0, batch)
    bottom_right = options.causal == "bottom_right"
    # The diagonal is aligned with the last key that counts: a mask alone cuts none there.
    if (lengths is None and (mask is None or bottom_right)) or not batch or not sk:
        return [_Part(everything, sk, options)]
    position = torch.arange(sk)
    seen = torch.ones(batch, sk, dtype=torch.bool) if mask is None else ~mask
    if bottom_right and lengths is not None:
        last, whole = lengths.clamp(0, sk).tolist(), [mask is None] * batch
    else:
        if lengths is not None:
            seen = seen & (position < lengths[:, None])
        ends = torch.where(seen, position + 1, 0).amax(1)
        whole = (seen.sum(1) == ends).tolist()  # without holes, the cut says all that the mask says
        last = ends.tolist()
        if heads * sq * sk * dim < _WORK_OF_A_CALL:
            last, whole = [max(last)] * batch, [all(whole) and min(last) == max(last)] * batch
    parts, start = [], 0
    for stop in range(1, batch + 1):
        if stop == batch or (last[stop], whole[stop]) != (last[start], whole[start]):
            rows, keys = slice(start, stop), last[start]
            own = _taken(options, rows, keys, None if whole[start] else seen)
            parts.append(_Part(rows, keys, own))
            start = stop
    return parts


def _served_by_flash(q: Tensor, sk: int, options: Options) -> bool:
    """Return whether PyTorch's flash routine computes this call.

    It takes a bias in the dtype of `q` alone; a wider one would be rounded. With very few keys the
    gradient of the logits cancels, to 0 where a row sees but one, and what is left is the rounding
    of its delta = rowsum(out * dout).
    """
    sq = q.shape[2]
    return (
        sq > 0
        and sk >= _FEW_KEYS
        and (options.bias is None or options.bias.dtype == q.dtype)
        and options.dropout_p == 0
        and options.window == (-1, -1)
        and options.softcap == 0
        and options.alibi_slopes is None
        and options.sinks is None
        and (options.causal != "bottom_right" or sq == sk)
    )


def _is_coarse(lse: Tensor, options: Options) -> bool:
    """Return whether a bias has shifted whole rows so far that their lse tells no weights.

    Of keys that all have a bias of finfo.min the lse is that number, however many they are.
    """
    return options.bias is not None and bool((lse.isfinite() & (lse.abs() > _COARSE)).any())


def _without_padding(k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    masks = (options.key_padding_mask, options.key_lengths)
    return without_padding(k, *masks), without_padding(v, *masks)


def _additive_mask(q: Tensor, sk: int, options: Options) -> Tensor | None:
    """Return bias and padding as one additive mask that broadcasts to (B, H, Sq, Sk), or None."""
    mask, padding = None, options.key_padding_mask
    if options.key_lengths is not None:
        beyond = torch.arange(sk) >= options.key_lengths[:, None]  # (B, Sk)
        padding = beyond if padding is None else padding | beyond
    if padding is None:
        return options.bias
    mask = torch.zeros((), dtype=q.dtype) if options.bias is None else options.bias
    return mask.masked_fill(padding[:, None, None, :], -math.inf)  # whatever the bias holds there


def _blind_rows(mask: Tensor, sq: int, causal: bool) -> Tensor:
    """Return which rows an additive mask leaves without a visible key; broadcasts to (B, H, Sq)."""
    if not causal:
        return (mask == -math.inf).all(-1)
    hidden = (mask == -math.inf).cummin(-1).values  # True up to the first visible key
    sk = hidden.shape[-1]
    hidden = hidden.expand(*hidden.shape[:2], sq, sk)
    blind = hidden.diagonal(dim1=-2, dim2=-1)
    return torch.cat([blind, hidden[..., sk:, -1]], -1) if sq > sk else blind


def _forward_part(q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    sq, sk = q.shape[2], k.shape[2]
    k, v = _without_padding(k, v, options)
    if not _served_by_flash(q, sk, options):
        return attention_blocks.forward(q, k, v, options)
    mask, causal = _additive_mask(q, sk, options), options.causal != "none"
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, causal, attn_mask=mask, scale=options.scale
    )
    lse = lse.contiguous()
    # The routine reports lse 0 for a row without a visible key; a mask alone can hide all.
    if mask is not None and (lse == 0).any():
        lse = lse.masked_fill(_blind_rows(mask, sq, causal), -math.inf)
    return out, lse


def _backward_part(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    options: Options,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    sk = k.shape[2]
    k, v = _without_padding(k, v, options)
    if (
        dlse is not None
        or bias_grad
        or not _served_by_flash(q, sk, options)
        or _is_coarse(lse, options)
    ):
        return attention_blocks.backward(dout, dlse, q, k, v, lse, options, bias_grad)
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
        attn_mask=_additive_mask(q, sk, options),
        scale=options.scale,
    )
    return dq, dk, dv, None, None


def options_of(
    bias: Tensor | None,
    key_padding_mask: Tensor | None,
    key_lengths: Tensor | None,
    *rest: Any,
) -> Options:
    """Return the options of a call from its arguments, in the order of the op."""
    alibi_slopes, sinks, seed, causal, window_left, window_right, softcap, scale, dropout_p = rest
    if bias is not None:
        bias = bias[(None,) * (4 - bias.ndim)]
    window = (window_left, window_right)
    return Options(
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


def forward(q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """Return the output (B, H, Sq, D) and lse (B, H, Sq) of dense attention."""
    parts = _parts(q, k.shape[2], options)
    if len(parts) == 1:
        _, keys, options = parts[0]
        return _forward_part(q, k[:, :, :keys], v[:, :, :keys], options)
    out = torch.empty_like(q)
    lse = torch.empty(q.shape[:3], dtype=widened(q[:0]).dtype)
    for rows, keys, own in parts:
        out[rows], lse[rows] = _forward_part(q[rows], k[rows, :, :keys], v[rows, :, :keys], own)
    return out, lse


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    options: Options,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return the gradients of q, k, v, and of the bias and the sinks where there are any."""
    parts = _parts(q, k.shape[2], options)
    if len(parts) == 1 and parts[0].keys == k.shape[2]:
        own = parts[0].options
        dq, dk, dv, dbias, dsinks = _backward_part(dout, dlse, q, k, v, out, lse, own, bias_grad)
    else:
        dq, dk, dv = (torch.empty_like(t) for t in (q, k, v))
        dbias = dsinks = None
        if bias_grad and options.bias is not None:
            dbias = torch.zeros(options.bias.shape, dtype=lse.dtype)
        if options.sinks is not None:
            dsinks = torch.zeros(options.sinks.shape, dtype=lse.dtype)
        for rows, keys, own in parts:
            dq[rows], dk[rows, :, :keys], dv[rows, :, :keys], part, mass = _backward_part(
                dout[rows],
                None if dlse is None else dlse[rows],
                q[rows],
                k[rows, :, :keys],
                v[rows, :, :keys],
                out[rows],
                lse[rows],
                own,
                bias_grad,
            )
            dk[rows, :, keys:], dv[rows, :, keys:] = 0, 0
            if dbias is not None and part is not None:
                target = dbias[rows] if dbias.shape[0] > 1 else dbias
                target = target[..., :keys] if dbias.shape[-1] > 1 else target
                target += part
            if dsinks is not None and mass is not None:
                dsinks += mass
    if dbias is not None and options.bias is not None:
        dbias = dbias.to(options.bias.dtype)
    if dsinks is not None and options.sinks is not None:
        dsinks = dsinks.to(options.sinks.dtype)
    return dq, dk, dv, dbias, dsinks


def shaped_like(gradient: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """Return the four-dimensional gradient of a bias in the bias's shape and dtype, if any."""
    if gradient is None or bias is None:
        return None
    return gradient.view(bias.shape).to(bias.dtype)


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
    options = options_of(
        bias,
        key_padding_mask,
        key_lengths,
        alibi_slopes,
        sinks,
        seed,
        causal,
        window_left,
        window_right,
        softcap,
        scale,
        dropout_p,
    )
    return forward(q, k, v, options)


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
    options = options_of(
        bias,
        key_padding_mask,
        key_lengths,
        alibi_slopes,
        sinks,
        seed,
        causal,
        window_left,
        window_right,
        softcap,
        scale,
        dropout_p,
    )
    dq, dk, dv, dbias, dsinks = backward(dout, dlse, q, k, v, out, lse, options, bias_grad)
    return dq, dk, dv, shaped_like(dbias, bias), dsinks
