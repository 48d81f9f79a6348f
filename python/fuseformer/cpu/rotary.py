"""Rotary position embedding on the CPU."""

import torch
from torch import Tensor

from ..reference import rotated_parts, widened


def _turn(
    x: Tensor, out: Tensor, cos: Tensor, sin: Tensor, inverse: bool, interleaved: bool
) -> None:
    """Write `x` (B, H, S, D), rotated, to `out`, which may be `x`."""
    half = cos.shape[-1]
    first, second = (widened(part) for part in rotated_parts(x, half, interleaved))
    cos, sin = (table.unsqueeze(-3).to(first.dtype) for table in (cos, sin))
    sign = -1 if inverse else 1
    turned = (
        torch.mul(first, cos).addcmul_(second, sin, value=-sign),
        torch.mul(second, cos).addcmul_(first, sin, value=sign),
    )
    for part, values in zip(rotated_parts(out, half, interleaved), turned, strict=True):
        part.copy_(values)
    if out is not x:
        out[..., 2 * half :] = x[..., 2 * half :]


def rotate(
    q: Tensor,
    k: Tensor,
    q_out: Tensor,
    k_out: Tensor,
    cos: Tensor,
    sin: Tensor,
    inverse: bool,
    interleaved: bool,
) -> None:
    """Write `q` and `k`, rotated, to `q_out` and `k_out`, which may be `q` and `k` themselves.

    `inverse` rotates back, which is the backward.
    """
    _turn(q, q_out, cos, sin, inverse, interleaved)
    _turn(k, k_out, cos, sin, inverse, interleaved)
