"""What encoder and decoder layers share: the feed-forward part and the residual endings."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.feed_forward import feed_forward
from ..ops.norm import add_layer_norm


def activation_name(activation: Callable[[Tensor], Tensor]) -> str | None:
    """Return the name that the ops have for `activation`, or None where they have none."""
    if activation in (F.relu, torch.relu) or isinstance(activation, torch.nn.ReLU):
        return "relu"
    if activation is F.silu or isinstance(activation, torch.nn.SiLU):
        return "silu"
    if isinstance(activation, torch.nn.GELU):
        return "gelu_tanh" if activation.approximate == "tanh" else "gelu"
    return "gelu" if activation is F.gelu else None


def rate(dropout: torch.nn.Dropout) -> float:
    """Return the probability with which `dropout` drops at present."""
    return dropout.p if dropout.training else 0.0


def feed_forward_part(layer: Any, x: Tensor) -> Tensor:
    """Return ``linear2(dropout(activation(linear1(x))))`` of an encoder or decoder layer."""
    name = activation_name(layer.activation)
    if name is None:
        return layer.linear2(layer.dropout(layer.activation(layer.linear1(x))))
    return feed_forward(
        x,
        layer.linear1.weight,
        layer.linear1.bias,
        layer.linear2.weight,
        layer.linear2.bias,
        activation=name,
        dropout_p=rate(layer.dropout),
    )


def add_norm(
    x: Tensor, residual: Tensor, norm: torch.nn.LayerNorm, dropout: torch.nn.Dropout
) -> Tensor:
    """Return ``norm(residual + dropout(x))``, the end of a post-LN sublayer."""
    return add_layer_norm(
        x, residual, norm.weight, norm.bias, eps=norm.eps, dropout_p=rate(dropout)
    )


def is_causal_mask(mask: Tensor | None, hint: bool | None, length: int) -> bool:
    """Return whether `mask` is the square causal mask: by the `hint`, else by looking at it.

    Under `torch.compile` a mask is not looked at, since its values are not known.
    """
    if hint is not None:
        return hint
    if mask is None or mask.shape != (length, length) or torch.compiler.is_compiling():
        return False
    expected = torch.nn.Transformer.generate_square_subsequent_mask(
        length, device=mask.device, dtype=mask.dtype if mask.is_floating_point() else torch.float32
    )
    return torch.equal(mask, expected == -torch.inf if mask.dtype == torch.bool else expected)
