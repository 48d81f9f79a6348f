"""Nested tensors, which the layers of `torch.nn` take in evaluation: padded, and nested again."""

import torch
from torch import Tensor


def padded(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return a nested tensor of (L, E) parts as (B, max L, E), zeros behind, and the padding mask.

    The mask is bool (B, max L), True at padding.
    """
    lengths = torch.tensor([part.shape[0] for part in x.unbind()], device=x.device)
    dense = torch.nested.to_padded_tensor(x, 0.0)
    return dense, torch.arange(dense.shape[1], device=x.device) >= lengths[:, None]


def nested_like(dense: Tensor, like: Tensor) -> Tensor:
    """Return `dense` (B, L, E) as a nested tensor with the lengths and the layout of `like`."""
    parts = [row[: part.shape[0]] for row, part in zip(dense, like.unbind(), strict=True)]
    return torch.nested.as_nested_tensor(parts, layout=like.layout)
