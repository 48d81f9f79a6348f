"""Attention within packed sequences: the public function and its custom op."""

import importlib
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backends import choose_backend, record, request_for, requested_backend
from . import checks
from .attention import (
    check_bias,
    check_extras,
    check_heads,
    default_scale,
    lse_dtype,
    unusual_scale,
    used_options,
)
from .registration import (
    absent,
    autocast_dtype,
    in_order,
    laid_out,
    present,
    register_autocast,
    second_derivatives,
)


def _kernels(backend: str) -> Any:
    return importlib.import_module(
        {
            "cuda": "fuseformer.cuda.attention",
            "triton": "fuseformer.kernels.attention",
            "cpu": "fuseformer.cpu.varlen_attention",
        }[backend]
    )


@torch.library.custom_op("fuseformer::varlen_attention", mutates_args=())
def _varlen_attention(
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
    backend: str,
) -> tuple[Tensor, Tensor]:
    options = unusual_scale(scale) | used_options(
        bias=bias,
        window=(window_left, window_right),
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
    )
    record(request_for("varlen_attention", q, k, options=options, head_dim=q.shape[-1]), backend)
    cu_seqlens_q, cu_seqlens_k = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
    alibi_slopes, sinks = in_order(alibi_slopes), in_order(sinks)
    out, lse = _kernels(backend).varlen_attention_forward(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        bias,
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
    return laid_out(out, q), lse


@_varlen_attention.register_fake
def _(q: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty((q.shape[1], q.shape[0]), dtype=lse_dtype(q))


@torch.library.custom_op("fuseformer::varlen_attention_backward", mutates_args=())
def _varlen_attention_backward(
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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    cu_seqlens_q, cu_seqlens_k = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
    alibi_slopes, sinks = in_order(alibi_slopes), in_order(sinks)
    dq, dk, dv, dbias, dsinks = _kernels(backend).varlen_attention_backward(
        dout,
        dlse,
        q,
        k,
        v,
        out,
        lse,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        bias,
        alibi_slopes,
        sinks,
        seed,
        causal,
        window_left,
        window_right,
        softcap,
        scale,
        dropout_p,
        bias_grad,
    )
    dq, dk, dv = laid_out(dq, q), laid_out(dk, k), laid_out(dv, v)
    return dq, dk, dv, present(dbias, q).contiguous(), present(dsinks, q)


@_varlen_attention_backward.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    q, k, v = arguments[2:5]
    bias, _, sinks = arguments[11:14]
    asked = bias is not None and arguments[-2]
    dbias = bias.new_empty(bias.shape) if asked else q.new_empty(0)
    dsinks = q.new_empty(0) if sinks is None else torch.empty_like(sinks)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), dbias, dsinks


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_q, cu_k, max_q, max_k, bias, alibi_slopes, sinks, seed, *options, backend = inputs
    ctx.save_for_backward(q, k, v, cu_q, cu_k, bias, alibi_slopes, sinks, seed, *output)
    ctx.lengths, ctx.options, ctx.backend = (max_q, max_k), options, backend
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, cu_q, cu_k, bias, alibi_slopes, sinks, seed, out, lse = ctx.saved_tensors
    if dout is None and dlse is None:
        return (None,) * 18
    if torch.is_grad_enabled():

        def formula(*inputs: Any) -> tuple[Tensor, Tensor]:
            q, k, v, bias, slopes, sinks = inputs
            causal, left, right, softcap, scale, dropout_p = ctx.options
            return reference.varlen_attention(
                q,
                k,
                v,
                cu_q,
                cu_k,
                causal=causal,
                bias=bias,
                window=(left, right),
                softcap=softcap,
                alibi_slopes=slopes,
                sinks=sinks,
                scale=scale,
                dropout_p=dropout_p,
                seed=seed,
            )

        inputs = (q, k, v, bias, alibi_slopes, sinks)
        dq, dk, dv, dbias, _, dsinks = second_derivatives(formula, inputs, (dout, dlse))
        return (dq, dk, dv, *(None,) * 4, dbias, None, dsinks, *(None,) * 8)
    if dout is None:
        dout = torch.zeros_like(out)
    dq, dk, dv, dbias, dsinks = _varlen_attention_backward(
        dout,
        dlse,
        q,
        k,
        v,
        out,
        lse,
        cu_q,
        cu_k,
        *ctx.lengths,
        bias,
        alibi_slopes,
        sinks,
        seed,
        *ctx.options,
        ctx.needs_input_grad[7],
        ctx.backend,
    )
    return (dq, dk, dv, *(None,) * 4, absent(dbias), None, absent(dsinks), *(None,) * 8)


_varlen_attention.register_autograd(_backward, setup_context=_save)
register_autocast(_varlen_attention, ("q", "k", "v"))


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    causal: bool | str = False,
    bias: Tensor | None = None,
    window: tuple[int, int] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """Return attention within each of the packed sequences; nothing is spent on padding.

    Shapes: `q` (Tq, H, D), `k` and `v` (Tk, Hkv, D). Sequence n owns the rows ``cu_seqlens[n]`` to
    ``cu_seqlens[n + 1]``; both offset tensors are int32 (N + 1,), and `max_seqlen_q`,
    `max_seqlen_k` bound the sequences' lengths. `bias` broadcasts to (N, H, max_seqlen_q,
    max_seqlen_k), its places counted within each sequence; it has a gradient. The other arguments
    are those of `attention`.

    Returns the output (Tq, H, D), and with `return_lse` also the log-sum-exp (H, Tq) in float32.
    Raises `ValueError` or `TypeError` that names the argument; on the CPU also where the offsets
    fall or do not end at the number of tokens, or a sequence is longer than its bound.
    """
    checks.tensor("q", q, 3)
    checks.tensor("k", k, 3, like=q)
    checks.tensor("v", v, 3, like=q)
    check_heads(q, k, v, 1)
    check_extras(q, q.shape[1], alibi_slopes, sinks)
    for label, offsets in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        checks.integers(label, offsets, (torch.int32,), q)
        if offsets.ndim != 1 or offsets.shape[0] < 1:
            raise ValueError(
                f"{label}: got shape {tuple(offsets.shape)}, expected (sequences + 1,)"
            )
    if cu_seqlens_k.shape != cu_seqlens_q.shape:
        raise ValueError(
            f"cu_seqlens_k: got {cu_seqlens_k.shape[0]} offsets, expected "
            f"{cu_seqlens_q.shape[0]} as in cu_seqlens_q"
        )
    if bias is not None:
        full = (cu_seqlens_q.shape[0] - 1, q.shape[1], max_seqlen_q, max_seqlen_k)
        check_bias(q, bias, full, "(sequences, heads, max_seqlen_q, max_seqlen_k)")
    alignment, sides = checks.causal(causal), checks.window(window)
    cap = checks.softcap(softcap)
    p = checks.probability("dropout_p", dropout_p)
    unusual = frozenset() if scale is None else unusual_scale(checks.scale(scale))
    scale = default_scale(q) if scale is None else scale
    dtype = autocast_dtype(q)
    request = request_for(
        "varlen_attention",
        q,
        k,
        options=unusual
        | used_options(
            bias=bias,
            window=sides,
            softcap=cap,
            alibi_slopes=alibi_slopes,
            sinks=sinks,
        ),
        head_dim=q.shape[-1],
        requested=requested_backend(backend),
        dtype=dtype,
    )
    name, _ = choose_backend(request)
    seed_tensor = checks.dropout_seed(seed, p, q)
    if name == "reference":
        record(request, name)
        out, lse = reference.varlen_attention(
            q.to(dtype),
            k.to(dtype),
            v.to(dtype),
            cu_seqlens_q,
            cu_seqlens_k,
            causal=alignment,
            bias=bias,
            window=sides,
            softcap=cap,
            alibi_slopes=alibi_slopes,
            sinks=sinks,
            scale=scale,
            dropout_p=p,
            seed=seed_tensor,
        )
    else:
        out, lse = _varlen_attention(
            q,
            k,
            v,
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            max_seqlen_k,
            bias,
            alibi_slopes,
            sinks,
            seed_tensor,
            alignment,
            *sides,
            cap,
            scale,
            p,
            name,
        )
    return (out, lse) if return_lse else out
