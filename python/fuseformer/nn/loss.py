"""The vocabulary projection and its loss as one module."""

import torch
from torch import Tensor

from ..ops import checks
from ..ops.cross_entropy import REDUCTIONS, linear_cross_entropy
from .parts import leaf


class LinearCrossEntropy(torch.nn.Linear):
    """``cross_entropy(linear(hidden), target)``, whose logits never exist all at once.

    `in_features` is the width of the hidden states, `out_features` the number of classes. The
    parameters are those of `torch.nn.Linear`, so that `weight` can be tied to an embedding.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        softcap: float | None = None,
        z_loss: float = 0.0,
        reduction: str = "mean",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        checks.one_of("reduction", reduction, REDUCTIONS)
        checks.not_negative("z_loss", z_loss)
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.softcap = softcap
        self.z_loss = z_loss
        self.reduction = reduction

    def forward(  # type: ignore[override]
        self, hidden: Tensor, target: Tensor, max_supervised: int | None = None
    ) -> Tensor:
        """Return the loss of `hidden` (..., in_features) against the classes `target` (...).

        Where `max_supervised` bounds the number of rows that count, nothing waits for the device.
        """
        if type(hidden) is torch.fx.Proxy:
            return leaf(self, hidden, target)
        return linear_cross_entropy(
            hidden,
            self.weight,
            target,
            bias=self.bias,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            softcap=self.softcap,
            z_loss=self.z_loss,
            reduction=self.reduction,
            max_supervised=max_supervised,
        )
