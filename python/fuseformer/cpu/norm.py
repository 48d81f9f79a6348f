"""Residual addition, dropout and normalisation on the CPU."""

import torch
from torch import Tensor

from ..philox import dropout_scale
from ..reference import widened
from .dropout import keep_mask

_ATEN = torch.ops.aten


def _factors(x: Tensor, seed: Tensor | None, dropout_p: float) -> Tensor | None:
    """Return the factors (T, width) that dropout multiplies `x` with, or None without dropout."""
    if dropout_p == 0:
        return None
    assert seed is not None
    keep = keep_mask(seed, dropout_p, range(1), range(1, 2), range(x.shape[0]), range(x.shape[1]))
    return keep[0, 0].to(widened(x[:0]).dtype).mul_(dropout_scale(dropout_p))


def _sum(x: Tensor, residual: Tensor, factors: Tensor | None) -> Tensor:
    """Return ``residual + dropout(x)`` in the dtype that sums are taken in."""
    return widened(residual) + (widened(x) if factors is None else widened(x) * factors)


def add_layer_norm_forward(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    eps: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the normalised sum (T, width), and mean and reciprocal deviation (T,)."""
    total = _sum(x, residual, _factors(x, seed, dropout_p))
    shift = None if bias is None else bias.to(total.dtype)
    y, mean, rstd = _ATEN.native_layer_norm(
        total, [x.shape[-1]], weight.to(total.dtype), shift, eps
    )
    return y.to(x.dtype), mean.flatten(), rstd.flatten()


def add_layer_norm_backward(
    dy: Tensor,
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    has_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return the gradients of x, residual, weight and bias; that of an absent bias is None."""
    factors = _factors(x, seed, dropout_p)
    total = _sum(x, residual, factors)
    wide = weight.to(total.dtype)
    dtotal, dweight, dbias = _ATEN.native_layer_norm_backward(
        widened(dy).contiguous(),
        total,
        [x.shape[-1]],
        mean[:, None],
        rstd[:, None],
        wide,
        torch.zeros_like(wide) if has_bias else None,
        [True, True, has_bias],
    )
    dx = dtotal.clone() if factors is None else dtotal * factors
    dbias = dbias.to(weight.dtype) if has_bias else None
    return dx.to(x.dtype), dtotal.to(x.dtype), dweight.to(weight.dtype), dbias


def add_rms_norm_forward(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    seed: Tensor | None,
    eps: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the normalised new residual, the new residual (T, width), and 1 / its rms (T,)."""
    new_residual = _sum(x, residual, _factors(x, seed, dropout_p)).to(x.dtype)
    wide = widened(new_residual)
    rstd = torch.rsqrt(wide.square().mean(-1) + eps)
    return (wide * rstd[:, None] * weight.to(wide.dtype)).to(x.dtype), new_residual, rstd


def add_rms_norm_backward(
    dy: Tensor,
    dnew_residual: Tensor | None,
    new_residual: Tensor,
    weight: Tensor,
    rstd: Tensor,
    seed: Tensor | None,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, residual and weight."""
    normal = widened(new_residual) * rstd[:, None]
    dnormal = widened(dy) * weight.to(normal.dtype)
    dweight = (widened(dy) * normal).sum(0)
    dtotal = (dnormal - normal * (dnormal * normal).mean(-1, keepdim=True)) * rstd[:, None]
    if dnew_residual is not None:
        dtotal = dtotal + dnew_residual
    factors = _factors(dy, seed, dropout_p)
    dx = dtotal.clone() if factors is None else dtotal * factors
    return dx.to(dy.dtype), dtotal.to(dy.dtype), dweight.to(weight.dtype)
