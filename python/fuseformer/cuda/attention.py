"""Attention by the CUDA C++ kernels: memory for the results, and one call of the compiled op.

The functions have the signatures of `fuseformer.kernels.attention`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..philox import dropout_scale, dropout_threshold
from . import library

#: Options of attention that the kernels have; dropout, causal masks and lengths are not named.
OPTIONS = frozenset({"window"})
#: Head dims with a forward and a backward kernel.
HEAD_DIMS = (32, 64, 96, 128, 256)
DTYPES = (torch.float16, torch.bfloat16)

_deterministic = True


@contextmanager
def nondeterministic() -> Iterator[None]:
    """Let the backward pass add to dq in any order meanwhile, for the whole process.

    dq may then differ in its last bits from run to run. Backward passes that run inside are meant,
    not forward ones.
    """
    global _deterministic
    previous, _deterministic = _deterministic, False
    try:
        yield
    finally:
        _deterministic = previous


def aligned(x: Tensor) -> Tensor:
    """Return `x`, copied where its rows do not lie as 16-byte copies need them."""
    steps = x.stride()[:-1]
    whole = all(n == 1 or s % 8 == 0 for n, s in zip(x.shape[:-1], steps, strict=True))
    if x.stride(-1) == 1 and whole and x.storage_offset() % 8 == 0 and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _options(
    key_lengths: Tensor | None,
    packing: tuple[Tensor, Tensor, int, int] | None,
    seed: Tensor | None,
    causal: str,
    window_left: int,
    window_right: int,
    scale: float,
    dropout_p: float,
) -> tuple[Any, ...]:
    """Return the arguments that both compiled ops end with."""
    cu_q, cu_k, max_q, max_k = packing or (None, None, 0, 0)
    return (
        None if key_lengths is None else key_lengths.to(torch.int32).contiguous(),
        cu_q,
        cu_k,
        seed if dropout_p else None,
        max_q,
        max_k,
        window_left,
        0 if causal != "none" else window_right,
        causal == "bottom_right",
        scale,
        dropout_threshold(dropout_p),
        dropout_scale(dropout_p),
    )


def result_like(x: Tensor, *, zeros: bool) -> Tensor:
    """Return memory for a result that lies like `x` where its rows are aligned then."""
    made = torch.zeros_like(x) if zeros else torch.empty_like(x)
    if all(n == 1 or s % 8 == 0 for n, s in zip(made.shape[:-1], made.stride()[:-1], strict=True)):
        return made
    return torch.zeros_like(x, memory_format=torch.contiguous_format)


def _forward(q: Tensor, k: Tensor, v: Tensor, packed: bool, options: Any) -> tuple[Tensor, Tensor]:
    # Rows between packed sequences are nobody's: they stay as they are made here.
    shape = (q.shape[1], q.shape[0]) if packed else q.shape[:3]
    out = result_like(q, zeros=packed)
    lse = q.new_empty(shape, dtype=torch.float32)
    if packed:
        lse.fill_(-torch.inf)
    library.ops().attention_forward(aligned(q), aligned(k), aligned(v), out, lse, *options)
    return out, lse


def _backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    sequences: int,
    packed: bool,
    options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    ops = library.ops()
    q, k, v, out, dout = (aligned(x) for x in (q, k, v, out, dout))
    dq, dk, dv = (result_like(x, zeros=packed) for x in (q, k, v))
    step = ops.attention_step_rows(q)
    heads, head_dim = q.shape[1], q.shape[-1]
    if packed:
        rows = (q.shape[0] // step + sequences) * step
    else:
        rows = sequences * -(-q.shape[2] // step) * step
    turns = q.new_zeros((heads, rows // step), dtype=torch.int32) if _deterministic else None
    ops.attention_backward(
        dout,
        None if dlse is None else dlse.contiguous(),
        q,
        k,
        v,
        out,
        lse.contiguous(),
        dq,
        dk,
        dv,
        q.new_empty((heads, rows), dtype=torch.float32),
        q.new_empty((heads, rows), dtype=torch.float32),
        q.new_zeros((heads, rows, head_dim), dtype=torch.float32),
        turns,
        *options,
    )
    return dq, dk, dv


def require_options(
    bias: Tensor | None,
    key_padding_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    softcap: float,
) -> None:
    """Raise `ValueError` for an option that the kernels do not have; choosing has refused it."""
    given = {
        "bias": bias is not None,
        "key_padding_mask": key_padding_mask is not None,
        "alibi_slopes": alibi_slopes is not None,
        "sinks": sinks is not None,
        "softcap": bool(softcap),
    }
    for name, used in given.items():
        if used:
            raise ValueError(f"{name}: the CUDA C++ kernels of attention have no such option")


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
    """Return the output (B, H, Sq, D) and the log-sum-exp (B, H, Sq)."""
    require_options(bias, key_padding_mask, alibi_slopes, sinks, softcap)
    options = _options(key_lengths, None, seed, causal, window_left, window_right, scale, dropout_p)
    return _forward(q, k, v, False, options)


def cached_attention_forward(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_lengths: Tensor,
    window_left: int,
    window_right: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return the output and lse of many new tokens over a contiguous cache.

    The last query is aligned with the last key that counts; 0 to the right of the window is causal.
    """
    unpacked, bottom_right, no_dropout = (None, None, None, 0, 0), True, (0, 1.0)
    window = (window_left, window_right)
    options = (cache_lengths, *unpacked, *window, bottom_right, scale, *no_dropout)
    return _forward(q, k_cache, v_cache, False, options)


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
) -> tuple[Tensor, Tensor, Tensor, None, None]:
    """Return dq, dk and dv, and None for the gradients of the bias and of the sinks."""
    require_options(bias, key_padding_mask, alibi_slopes, sinks, softcap)
    options = _options(key_lengths, None, seed, causal, window_left, window_right, scale, dropout_p)
    return (*_backward(dout, dlse, q, k, v, out, lse, q.shape[0], False, options), None, None)


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
    """Return the output (Tq, H, D) and the log-sum-exp (H, Tq)."""
    require_options(bias, None, alibi_slopes, sinks, softcap)
    packing = (cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous(), max_seqlen_q, max_seqlen_k)
    options = _options(None, packing, seed, causal, window_left, window_right, scale, dropout_p)
    return _forward(q, k, v, True, options)


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
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, None, None]:
    """Return dq, dk and dv, and None for the gradients of the bias and of the sinks."""
    require_options(bias, None, alibi_slopes, sinks, softcap)
    packing = (cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous(), max_seqlen_q, max_seqlen_k)
    options = _options(None, packing, seed, causal, window_left, window_right, scale, dropout_p)
    sequences = cu_seqlens_q.shape[0] - 1
    return (*_backward(dout, dlse, q, k, v, out, lse, sequences, True, options), None, None)
