"""Feed-forward by the CUDA C++ kernels, with the signatures of `fuseformer.kernels.feed_forward`.

Blocks of `RESIDENT_WIDTHS` run in one kernel, whose hidden activations never reach memory. In
others the first product ends in bias, activation and dropout, and the second is the vendor's. A few
tokens go forward by `few_rows`. The products of the backward pass are the vendor's, and one kernel
computes the gradient before the activation, the activation anew and the sums of the bias gradient.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..philox import dropout_scale, dropout_threshold
from . import few_rows, library
from .attention import aligned

#: Widths, of input and output, with a kernel for both products.
RESIDENT_WIDTHS = (64, 128, 256)
#: Rows and columns of 16-bit numbers are copied by eights.
MULTIPLE = 8
# Of `kGradientRows`, which the compiled op checks.
_ROWS_OF_SUMS = 256


def saves_pre(width: int, out_width: int, dtype: torch.dtype) -> bool:
    """Return whether forward saves the product before the activation."""
    return width != out_width or width not in RESIDENT_WIDTHS


def dropout_arguments(
    seed: Tensor | None, activation: str, dropout_p: float
) -> tuple[Tensor | None, str, int, float]:
    """Return the arguments that the compiled ops end with."""
    drops = seed if dropout_p else None
    return drops, activation, dropout_threshold(dropout_p), dropout_scale(dropout_p)


def feed_forward_forward(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    seed: Tensor | None,
    activation: str,
    dropout_p: float,
    saves: bool = True,
) -> tuple[Tensor, Tensor]:
    """Return the output (T, out), and the product before the activation where `saves_pre`.

    That is (T, hidden), or else empty (0,), as it is where no backward pass follows and it need not
    be one that `saves`.
    """
    dropout = dropout_arguments(seed, activation, dropout_p)
    b1, b2 = (None if b is None else aligned(b) for b in (b1, b2))
    x, w1 = aligned(x), aligned(w1)
    saves = saves and saves_pre(x.shape[1], w2.shape[0], x.dtype)
    pre: Tensor | None
    if few_rows.serves(x):
        act, pre, _ = few_rows.hidden_activation(x, w1, b1, None, dropout, saves)
    elif not saves_pre(x.shape[1], w2.shape[0], x.dtype):
        y = x.new_empty(x.shape)
        library.ops().feed_forward_forward(x, w1.contiguous(), b1, aligned(w2), b2, y, *dropout)
        return y, x.new_empty(0)
    else:
        act = x.new_empty(x.shape[0], w1.shape[0])
        pre = torch.empty_like(act) if saves else None
        library.ops().linear_activation(x, w1, b1, act, pre, *dropout)
    return last_product(act, w2, b2), x.new_empty(0) if pre is None else pre


def last_product(act: Tensor, w2: Tensor, b2: Tensor | None) -> Tensor:
    """Return the output (T, out) of the hidden activation (T, hidden)."""
    if few_rows.serves(act) and w2.shape[0] % MULTIPLE == 0:
        return few_rows.output(act, w2, b2)
    return F.linear(act, w2, b2)


def feed_forward_backward(
    dy: Tensor,
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    pre: Tensor,
    seed: Tensor | None,
    activation: str,
    dropout_p: float,
    has_b2: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None]:
    """Return the gradients of x, w1, b1, w2 and b2, that of an absent bias as None."""
    gradient = dy @ w2  # (T, hidden), that of the activation and then of what is before it
    act = pre.clone() if pre.numel() else F.linear(x, w1, b1)  # forward may have saved nothing
    sums = None
    if b1 is not None:
        blocks = -(-x.shape[0] // _ROWS_OF_SUMS)
        sums = x.new_empty((blocks, w1.shape[0]), dtype=torch.float32)
    dropout = dropout_arguments(seed, activation, dropout_p)
    library.ops().activation_gradient(gradient, act, sums, *dropout)
    db1 = None if sums is None else sums.sum(0).to(x.dtype)
    dw1, dw2 = gradient.T @ x, dy.T @ act
    return gradient @ w1, dw1, db1, dw2, dy.sum(0) if has_b2 else None
