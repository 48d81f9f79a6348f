"""Rotary position embedding on the CPU."""

from torch import Tensor

from ..reference import rotate


def rotary_forward(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool
) -> tuple[Tensor, Tensor]:
    """Return `q` and `k` rotated, or rotated back with `inverse`, which is the backward."""
    return rotate(q, cos, sin, inverse=inverse), rotate(k, cos, sin, inverse=inverse)
