"""Residual addition, dropout and normalisation as modules."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.norm import add_layer_norm, add_rms_norm


def add_and_norm(
    norm: torch.nn.Module, x: Tensor, residual: Tensor, dropout: torch.nn.Dropout
) -> Tensor:
    """Return ``norm(residual + dropout(x))``, fused where `norm` is a plain `LayerNorm`."""
    p = dropout.p if dropout.training else 0.0
    if (
        type(norm) is torch.nn.LayerNorm
        and len(norm.normalized_shape) == 1
        and norm.weight is not None
    ):
        return add_layer_norm(x, residual, norm.weight, norm.bias, eps=norm.eps, dropout_p=p)
    return norm(residual + F.dropout(x, p))


class AddLayerNorm(torch.nn.Module):
    """``layer_norm(residual + dropout(x))``, the end of a post-LN sublayer.

    `width` is the size of the last dimension. Parameters `weight` and `bias` (width,) are those of
    `torch.nn.LayerNorm`.
    """

    bias: torch.nn.Parameter | None

    def __init__(
        self,
        width: int,
        eps: float = 1e-5,
        dropout: float = 0.0,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.width, self.eps, self.dropout = width, eps, dropout
        self.weight = torch.nn.Parameter(torch.ones(width, device=device, dtype=dtype))
        zeros = torch.nn.Parameter(torch.zeros(width, device=device, dtype=dtype)) if bias else None
        self.register_parameter("bias", zeros)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """Return the normalised sum of `x` and `residual`, all (..., width)."""
        p = self.dropout if self.training else 0.0
        return add_layer_norm(x, residual, self.weight, self.bias, eps=self.eps, dropout_p=p)

    def extra_repr(self) -> str:
        """Return the options, for printing."""
        return f"{self.width}, eps={self.eps}, dropout={self.dropout}"


class AddRMSNorm(torch.nn.Module):
    """The RMS norm of ``residual + dropout(x)`` and that sum, the start of a pre-LN sublayer.

    `width` is the size of the last dimension; the parameter `weight` (width,) is that of
    `torch.nn.RMSNorm`.
    """

    def __init__(
        self,
        width: int,
        eps: float = 1e-6,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.width, self.eps, self.dropout = width, eps, dropout
        self.weight = torch.nn.Parameter(torch.ones(width, device=device, dtype=dtype))

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Return the normalised sum and the sum, each (..., width) like `x` and `residual`."""
        p = self.dropout if self.training else 0.0
        return add_rms_norm(x, residual, self.weight, eps=self.eps, dropout_p=p)

    def extra_repr(self) -> str:
        """Return the options, for printing."""
        return f"{self.width}, eps={self.eps}, dropout={self.dropout}"
