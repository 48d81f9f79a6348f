"""Modules around single ops: feed-forward blocks, residual norms, and the loss."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.cross_entropy import linear_cross_entropy
from ..ops.feed_forward import feed_forward, gated_feed_forward
from ..ops.norm import add_layer_norm, add_rms_norm


class FeedForward(nn.Module):
    """``linear2(dropout(activation(linear1(x))))`` through `fuseformer.feed_forward`.

    `width` and `hidden` are sizes; `activation` is "relu", "gelu", "gelu_tanh" or "silu". Input and
    output are (..., width).
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        activation: str = "relu",
        dropout: float = 0.0,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.activation, self.dropout = activation, dropout
        self.linear1 = nn.Linear(width, hidden, bias, device=device, dtype=dtype)
        self.linear2 = nn.Linear(hidden, width, bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output, of the shape of `x`."""
        return feed_forward(
            x,
            self.linear1.weight,
            self.linear1.bias,
            self.linear2.weight,
            self.linear2.bias,
            activation=self.activation,
            dropout_p=self.dropout if self.training else 0.0,
        )


class GatedFeedForward(nn.Module):
    """``down(activation(gate(x)) * up(x))`` through `fuseformer.gated_feed_forward`, no biases."""

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        activation: str = "silu",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.gate = nn.Linear(width, hidden, False, device=device, dtype=dtype)
        self.up = nn.Linear(width, hidden, False, device=device, dtype=dtype)
        self.down = nn.Linear(hidden, width, False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output, of the shape of `x`."""
        return gated_feed_forward(
            x, self.gate.weight, self.up.weight, self.down.weight, activation=self.activation
        )


class AddLayerNorm(nn.LayerNorm):
    """``layer_norm(residual + dropout(x))`` with the weights of `torch.nn.LayerNorm`."""

    def __init__(
        self,
        width: int,
        eps: float = 1e-5,
        *,
        dropout: float = 0.0,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(width, eps, True, bias, device=device, dtype=dtype)
        self.dropout = dropout

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:  # type: ignore[override]
        """Return the normalised sum; all shapes are (..., width)."""
        p = self.dropout if self.training else 0.0
        return add_layer_norm(x, residual, self.weight, self.bias, eps=self.eps, dropout_p=p)


class AddRMSNorm(nn.Module):
    """The RMS norm of ``residual + dropout(x)`` and that sum, with a learnable weight."""

    def __init__(
        self,
        width: int,
        eps: float = 1e-6,
        *,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps, self.dropout = eps, dropout
        self.weight = nn.Parameter(torch.ones(width, device=device, dtype=dtype))

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Return the norm and the next residual; all shapes are (..., width)."""
        p = self.dropout if self.training else 0.0
        return add_rms_norm(x, residual, self.weight, eps=self.eps, dropout_p=p)


class LinearCrossEntropy(nn.Linear):
    """A vocabulary projection that, given targets, returns its loss without forming the logits.

    Weights are those of `torch.nn.Linear`. Options are those of `fuseformer.linear_cross_entropy`.
    """

    def __init__(
        self,
        width: int,
        classes: int,
        bias: bool = False,
        *,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        softcap: float | None = None,
        reduction: str = "mean",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(width, classes, bias, device=device, dtype=dtype)
        self.ignore_index, self.label_smoothing = ignore_index, label_smoothing
        self.softcap, self.reduction = softcap, reduction

    def forward(self, hidden: Tensor, target: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Return the loss of `hidden` (..., width) against `target` (...), or the logits."""
        if target is None:
            logits = F.linear(hidden, self.weight, self.bias)
            return logits if self.softcap is None else self.softcap * (logits / self.softcap).tanh()
        return linear_cross_entropy(
            hidden,
            self.weight,
            target,
            bias=self.bias,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            softcap=self.softcap,
            reduction=self.reduction,
        )
