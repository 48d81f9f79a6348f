"""Residual addition, dropout and normalisation on the CPU."""

import torch
from torch import Tensor

from ..philox import dropout_scale
from ..reference import widened
from .dropout import keep_mask

_ATEN = torch.ops.aten


def _factors(x: Tensor, seed: Tensor | None, dropout_p: float) -> Tensor | None:
    """Return the factors (T, width) that dropout multiplies `x` with, or None without a seed."""
    if seed is None:
        return None
    keep = keep_mask(seed, dropout_p, range(1), range(1, 2), range(x.shape[0]), range(x.shape[1]))
    return keep[0, 0].to(widened(x[:0]).dtype).mul_(dropout_scale(dropout_p))


def _sum(x: Tensor, residual: Tensor, factors: Tensor | None) -> Tensor:
    """Return ``residual + dropout(x)`` in the dtype that sums are taken in."""
    return widened(residual) + (widened(x) if factors is None else widened(x) * factors)


def add_norm_forward(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    rms: bool,
    return_residual: bool,
    eps: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """Return the normalised sum, with `return_residual` the sum, unless `rms` the mean, and rstd.

    The mean and `rstd`, the reciprocal deviation, are (T,), the others (T, width) in the dtype of
    `residual`.
    """
    total = _sum(x, residual, _factors(x, seed, dropout_p))
    new_residual = None
    if return_residual:
        new_residual = total.to(residual.dtype)
        total = widened(new_residual)
    wide, shift = (None if p is None else p.to(total.dtype) for p in (weight, bias))
    if rms:
        rstd = torch.rsqrt(total.square().mean(-1) + eps)
        y = total * rstd[:, None]
        return (y if wide is None else y * wide).to(residual.dtype), new_residual, None, rstd
    y, mean, rstd = _ATEN.native_layer_norm(total, [x.shape[-1]], wide, shift, eps)
    return y.to(residual.dtype), new_residual, mean.flatten(), rstd.flatten()


def add_norm_backward(
    dy: Tensor,
    dtotal: Tensor | None,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    has_bias: bool,
) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor | None]:
    """Return the gradients of x, residual, weight and bias; those of absent parameters are None.

    Without a `residual` `x` is the sum that forward has returned, and `dtotal` its own gradient.
    Without dropout that of x is None, for that of the residual is the same. That of the bias has
    the dtype of the weight, or of `rstd` without one.
    """
    factors = _factors(x, seed, dropout_p)
    total = widened(x) if residual is None else _sum(x, residual, factors)
    wide_dy, wide = widened(dy), None if weight is None else weight.to(total.dtype)
    dweight = dbias = None
    if mean is None:
        normal = total * rstd[:, None]
        dnormal = wide_dy if wide is None else wide_dy * wide
        dweight = None if wide is None else (wide_dy * normal).sum(0)
        dresidual = (dnormal - normal * (dnormal * normal).mean(-1, keepdim=True)) * rstd[:, None]
    else:
        dresidual, dweight, dbias = _ATEN.native_layer_norm_backward(
            wide_dy.contiguous(),
            total,
            [x.shape[-1]],
            mean[:, None],
            rstd[:, None],
            wide,
            total.new_zeros(x.shape[-1]) if has_bias else None,
            [True, wide is not None, has_bias],
        )
    if dtotal is not None:
        dresidual = dresidual + dtotal
    dx = None if factors is None else (dresidual * factors).to(x.dtype)
    dresidual = dresidual.to((x if residual is None else residual).dtype)
    kind = rstd.dtype if weight is None else weight.dtype
    dweight = None if weight is None or dweight is None else dweight.to(kind)
    return dx, dresidual, dweight, dbias.to(kind) if has_bias and dbias is not None else None
