"""What the plain twins share: the dtype of sums, activations, dropout."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..philox import dropout_scale, keep_mask

ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu")


def widened(x: Tensor) -> Tensor:
    """Return `x` in the dtype that sums are taken in: float64 for float64, float32 otherwise."""
    return x if x.dtype == torch.float64 else x.float()


def apply_activation(x: Tensor, activation: str) -> Tensor:
    """Return the activation named by one of `ACTIVATIONS`, element by element."""
    if activation == "relu":
        return F.relu(x)
    if activation == "silu":
        return F.silu(x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def dropout(x: Tensor, p: float, seed: Tensor | None, stream: int) -> Tensor:
    """Return `x` (T, width) after dropout; `stream` takes the place of the head in the counter."""
    if p == 0:
        return x
    assert seed is not None
    keep = keep_mask(seed, p, range(1), range(stream, stream + 1), range(x.shape[0]), x.shape[1])
    return x * keep[0, 0] * dropout_scale(p)
