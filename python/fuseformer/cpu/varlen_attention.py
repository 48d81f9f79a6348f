"""Attention over packed sequences on the CPU: each sequence by itself, so padding costs nothing."""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from .attention import _backward, _forward, _Options


def _sequences(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> Iterator[tuple[slice, slice]]:
    """Yield the query rows and the key rows of each packed sequence."""
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for n in range(len(starts_q) - 1):
        yield slice(starts_q[n], starts_q[n + 1]), slice(starts_k[n], starts_k[n + 1])


def _check(name: str, cu_seqlens: Tensor, total: int) -> None:
    """Raise `ValueError` unless the offsets start at 0, do not fall, and end at `total`."""
    values = cu_seqlens.tolist()
    if values[0] != 0 or values[-1] != total or any(a > b for a, b in itertools.pairwise(values)):
        raise ValueError(
            f"{name}: got {values[:4]}..{values[-1]}, expected offsets that start at 0, never fall "
            f"and end at the number of packed tokens, {total}"
        )


def _one(x: Tensor, rows: slice) -> Tensor:
    return x[rows].transpose(0, 1)[None]  # (1, H, S, D)


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
    """Return the output (Tq, H, D) and lse (H, Tq) of attention within packed sequences."""
    _check("cu_seqlens_q", cu_seqlens_q, q.shape[0])
    _check("cu_seqlens_k", cu_seqlens_k, k.shape[0])
    out = torch.empty_like(q)
    lse = torch.empty(
        q.shape[1], q.shape[0], dtype=torch.float64 if q.dtype == torch.float64 else torch.float32
    )
    window = (window_left, window_right)
    options = _Options(
        None, None, None, alibi_slopes, sinks, seed, causal, window, softcap, scale, dropout_p
    )
    for n, (rows, columns) in enumerate(_sequences(cu_seqlens_q, cu_seqlens_k)):
        part, part_lse = _forward(
            _one(q, rows), _one(k, columns), _one(v, columns), options._replace(first_batch=n)
        )
        out[rows] = part[0].transpose(0, 1)
        lse[:, rows] = part_lse[0]
    return out, lse


def varlen_attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return the gradients of q, k and v, and of the sinks where there are any."""
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    dsinks = None if sinks is None else torch.zeros_like(sinks)
    window = (window_left, window_right)
    options = _Options(
        None, None, None, alibi_slopes, sinks, seed, causal, window, softcap, scale, dropout_p
    )
    for n, (rows, columns) in enumerate(_sequences(cu_seqlens_q, cu_seqlens_k)):
        parts = _backward(
            _one(dout, rows),
            None if dlse is None else dlse[None, :, rows],
            _one(q, rows),
            _one(k, columns),
            _one(v, columns),
            _one(out, rows),
            lse[None, :, rows],
            options._replace(first_batch=n),
            False,
        )
        for whole, part, where in (
            (dq, parts[0], rows),
            (dk, parts[1], columns),
            (dv, parts[2], columns),
        ):
            whole[where] = part[0].transpose(0, 1)
        if dsinks is not None and parts[4] is not None:
            dsinks += parts[4]
    return dq, dk, dv, dsinks
