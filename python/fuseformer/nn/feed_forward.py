"""Feed-forward blocks as modules, and the feed-forward part of a Transformer layer."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import checks
from ..ops.feed_forward import feed_forward, gated_feed_forward
from ..reference import apply_activation
from .parts import fusable, is_plain, leaf

_FUNCTIONS: tuple[tuple[Any, str], ...] = (
    (F.relu, "relu"),
    (torch.relu, "relu"),
    (F.gelu, "gelu"),
    (F.silu, "silu"),
)


def activation_name(function: Any) -> str | None:
    """Return the name under which the fused op knows an activation, or None."""
    for known, name in _FUNCTIONS:
        if function is known:
            return name
    if isinstance(function, torch.nn.Module):
        if is_plain(function, torch.nn.ReLU):
            return "relu"
        if is_plain(function, torch.nn.SiLU):
            return "silu"
        if not is_plain(function, torch.nn.GELU):
            return None
        return "gelu" if function.approximate == "none" else "gelu_tanh"
    return None


def are_plain_linears(*modules: Any) -> bool:
    """Return whether all `modules` are plain linear layers, which an op may stand for."""
    return all(is_plain(m, torch.nn.Linear) and fusable(m.weight) for m in modules)


def layer_feed_forward(layer: Any, x: Tensor) -> Tensor:
    """Return the feed-forward part of a Transformer layer, before its residual dropout.

    Plain PyTorch serves an activation that the op does not know, and modules with hooks or
    replaced by others, such as adapters.
    """
    linear1, linear2, dropout = layer.linear1, layer.linear2, layer.dropout
    name = activation_name(layer.activation)
    if name is None or not (
        are_plain_linears(linear1, linear2) and is_plain(dropout, torch.nn.Dropout)
    ):
        return linear2(dropout(layer.activation(linear1(x))))
    return feed_forward(
        x,
        linear1.weight,
        linear1.bias,
        linear2.weight,
        linear2.bias,
        activation=name,
        dropout_p=dropout.p if dropout.training else 0.0,
    )


class FeedForward(torch.nn.Module):
    """``linear2(dropout(activation(linear1(x))))`` in one op.

    `width` is the size of the input and output, `hidden` that between; `activation` is "relu",
    "gelu", "gelu_tanh" or "silu". Raises `ValueError` for another activation.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        activation: str = "relu",
        dropout: float = 0.0,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        checks.activation(activation)
        self.activation, self.dropout = activation, checks.probability("dropout", dropout)
        self.linear1 = torch.nn.Linear(width, hidden, bias=bias, device=device, dtype=dtype)
        self.linear2 = torch.nn.Linear(hidden, width, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output (..., width) for `x` (..., width)."""
        if type(x) is torch.fx.Proxy:
            return leaf(self, x)
        linear1, linear2 = self.linear1, self.linear2
        p = self.dropout if self.training else 0.0
        if not are_plain_linears(linear1, linear2):
            hidden = apply_activation(linear1(x), self.activation)
            return linear2(F.dropout(hidden, p))
        return feed_forward(
            x,
            linear1.weight,
            linear1.bias,
            linear2.weight,
            linear2.bias,
            activation=self.activation,
            dropout_p=p,
        )


class GatedFeedForward(torch.nn.Module):
    """``down_proj(activation(gate_proj(x)) * up_proj(x))`` in one op, without biases.

    `width` is the size of the input and output, `hidden` that between. Parameter names are those
    of Llama's feed-forward block. Raises `ValueError` for an unknown activation.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        activation: str = "silu",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        checks.activation(activation)
        self.activation = activation
        self.gate_proj = torch.nn.Linear(width, hidden, bias=False, device=device, dtype=dtype)
        self.up_proj = torch.nn.Linear(width, hidden, bias=False, device=device, dtype=dtype)
        self.down_proj = torch.nn.Linear(hidden, width, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output (..., width) for `x` (..., width)."""
        if type(x) is torch.fx.Proxy:
            return leaf(self, x)
        gate_proj, up_proj, down_proj = self.gate_proj, self.up_proj, self.down_proj
        if not are_plain_linears(gate_proj, up_proj, down_proj):
            return down_proj(apply_activation(gate_proj(x), self.activation) * up_proj(x))
        weights = (gate_proj.weight, up_proj.weight, down_proj.weight)
        return gated_feed_forward(x, *weights, activation=self.activation)
