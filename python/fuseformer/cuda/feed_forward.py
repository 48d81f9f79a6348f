"""Feed-forward by the CUDA C++ kernels, with the signatures of `fuseformer.kernels.feed_forward`.

Blocks of `RESIDENT_WIDTHS` run in one kernel each way, whose hidden activations never reach memory.
In others the first product ends in bias, activation and dropout, and the second is the vendor's. So
are those of the backward pass, where one kernel computes the gradient before the activation, the
activation anew and the sums of the bias gradient. A few tokens go forward by `few_rows`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..philox import dropout_scale, dropout_threshold
from . import few_rows, library
from .attention import aligned
from .decode import multiprocessors

#: Widths, of input and output, with a kernel for both products.
RESIDENT_WIDTHS = (64, 128, 256)
#: Rows and columns of 16-bit numbers are copied by eights.
MULTIPLE = 8
# Of `kGradientRows`, which the compiled op checks.
_ROWS_OF_SUMS = 256
# Splits of fewer steps cost more to join than they save.
_LEAST_STEPS = 4


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
    if not saves_pre(x.shape[1], w2.shape[0], x.dtype):
        dx, dw1, db1, dw2 = _resident_backward(dy, x, w1, b1, w2, seed, activation, dropout_p)
        return dx, dw1, db1, dw2, dy.sum(0) if has_b2 else None
    gradient = dy @ w2  # (T, hidden), that of the activation and then of what is before it
    # Forward may have saved nothing.
    act = pre.clone() if pre.numel() == gradient.numel() else F.linear(x, w1, b1)
    sums = None
    if b1 is not None:
        blocks = -(-x.shape[0] // _ROWS_OF_SUMS)
        sums = x.new_empty((blocks, w1.shape[0]), dtype=torch.float32)
    dropout = dropout_arguments(seed, activation, dropout_p)
    library.ops().activation_gradient(gradient, act, sums, *dropout)
    db1 = None if sums is None else sums.sum(0).to(x.dtype)
    dw1, dw2 = gradient.T @ x, dy.T @ act
    return gradient @ w1, dw1, db1, dw2, dy.sum(0) if has_b2 else None


def _dx_parts(steps: int, blocks: int) -> int:
    """Return how many sums of dx the blocks of hidden units share, where each takes `steps`.

    A block adds to dx of a step after the ones before it in its part, each a quarter of a step
    later: so many blocks make a part that the last one waits for at most a tenth of its own work.
    """
    return -(-blocks // max(1, 1 + 2 * steps // 5))


def _resident_backward(
    dy: Tensor,
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    seed: Tensor | None,
    activation: str,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Return the gradients of x, w1, b1 and w2 from one kernel, which keeps sums in float32."""
    ops = library.ops()
    (tokens, width), hidden = x.shape, w1.shape[0]
    step_tokens, block_units = ops.feed_forward_step_tokens(x), ops.feed_forward_block_units(x)
    steps, blocks = -(-tokens // step_tokens), -(-hidden // block_units)
    # As many blocks as there are multiprocessors, if tokens suffice.
    splits = max(1, min(multiprocessors(x.device) // max(blocks, 1), steps // _LEAST_STEPS))
    parts = _dx_parts(-(-steps // splits), blocks)
    dx, dw1, dw2 = x.new_empty(x.shape), w1.new_empty(w1.shape), w2.new_empty(w2.shape)
    db1 = None if b1 is None else b1.new_empty(b1.shape)
    dropout = dropout_arguments(seed, activation, dropout_p)
    ops.feed_forward_backward(
        aligned(dy),
        aligned(x),
        aligned(w1).contiguous(),
        None if b1 is None else aligned(b1),
        aligned(w2),
        dx,
        dw1,
        db1,
        dw2,
        x.new_zeros((parts, steps, step_tokens, width), dtype=torch.float32),
        x.new_zeros((parts, steps), dtype=torch.int32),
        x.new_empty((splits, 2, hidden, width), dtype=torch.float32),
        x.new_empty((splits, hidden), dtype=torch.float32),
        *dropout,
    )
    return dx, dw1, db1, dw2
