"""Scaled dot-product attention over dense batches: the public function and its custom op."""

import importlib
import math
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backends import choose_backend, record, request_for, requested_backend
from . import checks
from .registration import (
    absent,
    autocast_dtype,
    in_order,
    laid_out,
    lengths_within,
    present,
    register_autocast,
    second_derivatives,
)


def _kernels(backend: str) -> Any:
    return importlib.import_module(
        {
            "cuda": "fuseformer.cuda.attention",
            "triton": "fuseformer.kernels.attention",
            "cpu": "fuseformer.cpu.attention",
        }[backend]
    )


def lse_dtype(q: Tensor) -> torch.dtype:
    """Return the dtype of the log-sum-exp that attention on `q` gives."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def default_scale(q: Tensor) -> float:
    """Return the factor of the logits that keeps their variance at that of the inputs."""
    return 1 / math.sqrt(max(1, q.shape[-1]))


def unusual_scale(scale: float) -> frozenset[str]:
    """Return the option that a scale is which not every kernel takes, if it is one.

    A plain branch on the number: compiled code guards it.
    """
    return frozenset() if 1e-30 < scale < 1e30 else frozenset({"a scale outside 1e-30 to 1e30"})


def used_options(**named: Any) -> frozenset[str]:
    """Return the names of the optional features that are in use."""
    unused = (None, 0.0, (-1, -1))
    return frozenset(n for n, x in named.items() if isinstance(x, Tensor) or x not in unused)


@torch.library.custom_op("fuseformer::attention", mutates_args=())
def _attention(
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
    backend: str,
) -> tuple[Tensor, Tensor]:
    options = unusual_scale(scale) | used_options(
        bias=bias,
        key_padding_mask=key_padding_mask,
        window=(window_left, window_right),
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
    )
    record(request_for("attention", q, k, options=options, head_dim=q.shape[-1]), backend)
    key_lengths = None if key_lengths is None else lengths_within(key_lengths, k.shape[2])
    alibi_slopes, sinks = in_order(alibi_slopes), in_order(sinks)
    out, lse = _kernels(backend).attention_forward(
        q,
        k,
        v,
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
    return laid_out(out, q), lse


@_attention.register_fake
def _(q: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=lse_dtype(q))


@torch.library.custom_op("fuseformer::attention_backward", mutates_args=())
def _attention_backward(
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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    key_lengths = None if key_lengths is None else lengths_within(key_lengths, k.shape[2])
    alibi_slopes, sinks = in_order(alibi_slopes), in_order(sinks)
    dq, dk, dv, dbias, dsinks = _kernels(backend).attention_backward(
        dout,
        dlse,
        q,
        k,
        v,
        out,
        lse,
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
        bias_grad,
    )
    dq, dk, dv = laid_out(dq, q), laid_out(dk, k), laid_out(dv, v)
    return dq, dk, dv, present(dbias, q).contiguous(), present(dsinks, q)


@_attention_backward.register_fake
def _(
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
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dbias = bias.new_empty(bias.shape) if bias is not None and rest[-2] else q.new_empty(0)
    dsinks = q.new_empty(0) if sinks is None else torch.empty_like(sinks)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), dbias, dsinks


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:9], *output)
    ctx.options = inputs[9:15]
    ctx.backend = inputs[15]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, *optional, out, lse = ctx.saved_tensors
    if dout is None and dlse is None:
        return (None,) * 16
    if torch.is_grad_enabled():

        def formula(*inputs: Any) -> tuple[Tensor, Tensor]:
            q, k, v, bias, padding, lengths, slopes, sinks, seed = inputs
            causal, left, right, softcap, scale, dropout_p = ctx.options
            return reference.attention(
                q,
                k,
                v,
                causal=causal,
                key_padding_mask=padding,
                key_lengths=lengths,
                bias=bias,
                window=(left, right),
                softcap=softcap,
                alibi_slopes=slopes,
                sinks=sinks,
                scale=scale,
                dropout_p=dropout_p,
                seed=seed,
            )

        return (*second_derivatives(formula, (q, k, v, *optional), (dout, dlse)), *(None,) * 7)
    if dout is None:
        dout = torch.zeros_like(out)
    dq, dk, dv, dbias, dsinks = _attention_backward(
        dout,
        dlse,
        q,
        k,
        v,
        out,
        lse,
        *optional,
        *ctx.options,
        ctx.needs_input_grad[3],
        ctx.backend,
    )
    return (dq, dk, dv, absent(dbias), None, None, None, absent(dsinks), *(None,) * 8)


_attention.register_autograd(_backward, setup_context=_save)
register_autocast(_attention, ("q", "k", "v"))


def check_masks(q: Tensor, k: Tensor, key_padding_mask: Any, key_lengths: Any, bias: Any) -> None:
    """Raise `TypeError` or `ValueError` for a mask, lengths or bias that do not fit `q` and `k`."""
    batch, heads, sq, sk = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
    if key_padding_mask is not None:
        checks.integers("key_padding_mask", key_padding_mask, (torch.bool,), q)
        checks.shape("key_padding_mask", key_padding_mask, (batch, sk), "(batch, keys)")
    if key_lengths is not None:
        checks.integers("key_lengths", key_lengths, (torch.int32, torch.int64), q)
        checks.shape("key_lengths", key_lengths, (batch,), "(batch,)")
    if bias is not None:
        check_bias(q, bias, (batch, heads, sq, sk), "(batch, heads, queries, keys)")


def check_bias(q: Tensor, bias: Any, full: tuple[int, ...], names: str) -> None:
    """Require a bias beside `q` that broadcasts to the shape `full`, whose sizes are `names`."""
    checks.tensor("bias", bias)
    checks.device("bias", bias, q)
    sizes = (1,) * (4 - bias.ndim) + tuple(bias.shape)
    if bias.ndim > 4 or any(n not in (1, m) for n, m in zip(sizes, full, strict=True)):
        raise ValueError(
            f"bias: got shape {tuple(bias.shape)}, expected one that broadcasts to {names} = {full}"
        )


def check_heads(q: Tensor, k: Tensor, v: Tensor, heads_dim: int) -> None:
    """Require that keys and values fit the queries; `heads_dim` is the dimension of the heads."""
    if k.shape != v.shape:
        raise ValueError(f"v: got shape {tuple(v.shape)}, expected that of k, {tuple(k.shape)}")
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"k: got head dim {k.shape[-1]}, expected {q.shape[-1]} as in q")
    heads, kv_heads = q.shape[heads_dim], k.shape[heads_dim]
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"k: got {kv_heads} heads, expected a divisor of q's {heads} heads")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.shape[-1] and x.stride(-1) != 1 and x.shape[-1] != 1:
            raise ValueError(f"{name}: got stride {x.stride(-1)} in the last dimension, expected 1")


def check_extras(q: Tensor, heads: int, alibi_slopes: Any, sinks: Any) -> None:
    """Require per-head tensors of the right size."""
    if alibi_slopes is not None:
        checks.tensor("alibi_slopes", alibi_slopes, 1)
        checks.device("alibi_slopes", alibi_slopes, q)
        checks.shape("alibi_slopes", alibi_slopes, (heads,), "(heads,)")
        if alibi_slopes.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "alibi_slopes: got a tensor that requires a gradient, expected constants; a "
                "learnable table goes into bias"
            )
    if sinks is not None:
        checks.tensor("sinks", sinks, 1)
        checks.device("sinks", sinks, q)
        checks.shape("sinks", sinks, (heads,), "(heads,)")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool | str = False,
    key_padding_mask: Tensor | None = None,
    key_lengths: Tensor | None = None,
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
    """Return scaled dot-product attention of `q` over `k` and `v`, with softmax kept on chip.

    Shapes: `q` (B, H, Sq, D), `k` and `v` (B, Hkv, Sk, D) with Hkv a divisor of H; any strides
    whose last one is 1. `causal=True` aligns top-left, ``"bottom_right"`` aligns the last query
    with the last key that counts: of each `key_lengths` where they are given, else of `k`.
    `window` (left, right) and ALiBi's distances count from that diagonal, -1 is unbounded.
    `key_padding_mask` (B, Sk) is True at padding and moves no diagonal; keys at or past
    `key_lengths` (B,), which are bounded by Sk, are padding.
    `bias` broadcasts to (B, H, Sq, Sk) and has a gradient, as do `sinks` (H,), logits that join the
    denominator only. `scale` is ``D ** -0.5`` unless given. Logits are
    ``softcap * tanh(q @ k.T * scale / softcap) + bias - alibi_slopes * distance``, then masks.
    Dropout draws a seed from PyTorch's generator unless `seed` is given.

    Returns the output (B, H, Sq, D), and with `return_lse` also the natural log-sum-exp (B, H, Sq)
    in float32. A row that sees no key has output 0, lse -inf and zero gradients.

    Raises `ValueError` or `TypeError` that names the argument. Source: Vaswani et al., "Attention
    Is All You Need", 2017; Dao et al., "FlashAttention", 2022.
    """
    checks.tensor("q", q, 4)
    checks.tensor("k", k, 4, like=q)
    checks.tensor("v", v, 4, like=q)
    if k.shape[0] != q.shape[0]:
        raise ValueError(f"k: got batch size {k.shape[0]}, expected {q.shape[0]} as in q")
    check_heads(q, k, v, 1)
    check_extras(q, q.shape[1], alibi_slopes, sinks)
    check_masks(q, k, key_padding_mask, key_lengths, bias)
    alignment, sides = checks.causal(causal), checks.window(window)
    cap = checks.softcap(softcap)
    p = checks.probability("dropout_p", dropout_p)
    unusual = frozenset() if scale is None else unusual_scale(checks.scale(scale))
    scale = default_scale(q) if scale is None else scale
    request = request_for(
        "attention",
        q,
        k,
        options=unusual
        | used_options(
            bias=bias,
            key_padding_mask=key_padding_mask,
            window=sides,
            softcap=cap,
            alibi_slopes=alibi_slopes,
            sinks=sinks,
        ),
        head_dim=q.shape[-1],
        requested=requested_backend(backend),
        dtype=autocast_dtype(q),
    )
    name, _ = choose_backend(request)
    seed_tensor = checks.dropout_seed(seed, p, q)
    if name == "reference":
        record(request, name)
        dtype = autocast_dtype(q)
        out, lse = reference.attention(
            q.to(dtype),
            k.to(dtype),
            v.to(dtype),
            causal=alignment,
            key_padding_mask=key_padding_mask,
            key_lengths=key_lengths,
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
        out, lse = _attention(
            q,
            k,
            v,
            bias,
            key_padding_mask,
            key_lengths,
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
