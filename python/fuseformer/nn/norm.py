"""Residual addition, dropout and normalisation as modules."""

from typing import Any

import torch
from torch import Tensor

from ..ops.norm import add_layer_norm, add_rms_norm
from .parts import fusable, is_plain, leaf


def add_and_norm(norm: Any, x: Tensor, residual: Tensor, dropout: Any) -> Tensor:
    """Return ``norm(residual + dropout(x))``, fused where both modules are PyTorch's own."""
    if (
        is_plain(norm, torch.nn.LayerNorm)
        and is_plain(dropout, torch.nn.Dropout)
        and len(norm.normalized_shape) == 1
        and fusable(norm.weight)
    ):
        p = dropout.p if dropout.training else 0.0
        return add_layer_norm(x, residual, norm.weight, norm.bias, eps=norm.eps, dropout_p=p)
    return norm(residual + dropout(x))


class AddLayerNorm(torch.nn.Module):
    """``layer_norm(residual + dropout(x))``, the end of a post-LN sublayer.

    With `return_residual` a call returns that sum too, for a pre-LN sublayer. `width` is the size
    of the last dimension. Parameters `weight` and `bias` (width,) are those of
    `torch.nn.LayerNorm`.
    """

    bias: torch.nn.Parameter | None

    def __init__(
        self,
        width: int,
        eps: float = 1e-5,
        dropout: float = 0.0,
        bias: bool = True,
        return_residual: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.width, self.eps, self.dropout = width, eps, dropout
        self.return_residual = return_residual
        self.weight = torch.nn.Parameter(torch.ones(width, device=device, dtype=dtype))
        zeros = torch.nn.Parameter(torch.zeros(width, device=device, dtype=dtype)) if bias else None
        self.register_parameter("bias", zeros)

    def forward(self, x: Tensor, residual: Tensor) -> Any:
        """Return the normalised sum of `x` and `residual`, all (..., width), and the sum if asked.

        The sum comes with `return_residual`, second.
        """
        if type(x) is torch.fx.Proxy:
            return leaf(self, x, residual)
        p = self.dropout if self.training else 0.0
        return add_layer_norm(
            x,
            residual,
            self.weight,
            self.bias,
            eps=self.eps,
            dropout_p=p,
            return_residual=self.return_residual,
        )

    def extra_repr(self) -> str:
        """Return the options, for printing."""
        return f"{self.width}, eps={self.eps}, dropout={self.dropout}"


class AddRMSNorm(torch.nn.Module):
    """The RMS norm of ``residual + dropout(x)`` and that sum, the start of a pre-LN sublayer.

    Without `return_residual` a call returns the norm alone, for a post-LN sublayer. `width` is the
    size of the last dimension; the parameter `weight` (width,) is that of `torch.nn.RMSNorm`.
    """

    def __init__(
        self,
        width: int,
        eps: float = 1e-6,
        dropout: float = 0.0,
        return_residual: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.width, self.eps, self.dropout = width, eps, dropout
        self.return_residual = return_residual
        self.weight = torch.nn.Parameter(torch.ones(width, device=device, dtype=dtype))

    def forward(self, x: Tensor, residual: Tensor) -> Any:
        """Return the normalised sum and the sum, each (..., width) like `x` and `residual`.

        Without `return_residual` only the first.
        """
        if type(x) is torch.fx.Proxy:
            return leaf(self, x, residual)
        p = self.dropout if self.training else 0.0
        return add_rms_norm(
            x,
            residual,
            self.weight,
            eps=self.eps,
            dropout_p=p,
            return_residual=self.return_residual,
        )

    def extra_repr(self) -> str:
        """Return the options, for printing."""
        return f"{self.width}, eps={self.eps}, dropout={self.dropout}"
