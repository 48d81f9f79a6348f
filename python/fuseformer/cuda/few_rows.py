"""Feed-forward of a few tokens by the CUDA C++ kernels: each weight is read once.

The first product, or both of a gated block, up to the hidden activation in one kernel, a block for
some hidden units; the last product in another, split over the hidden dimension too, so that its
blocks fill the GPU. The parts add up in a third, in their order.
"""

import torch
from torch import Tensor

from . import library
from .attention import aligned

#: Tokens of one product of the tensor cores: the kernels take no more.
MAX_TOKENS = 16

# Of `FewRowsTraits`: outputs of a block, and hidden units of a chunk.
_BLOCK_N, _CHUNK = 32, 64
# Blocks that the last product should have, on the largest GPUs two for a multiprocessor, and chunks
# of a part: fewer cost more to add up than they save.
_BLOCKS, _LEAST_CHUNKS = 256, 8


def serves(x: Tensor) -> bool:
    """Return whether these kernels are taken for `x` (T, width)."""
    return x.shape[0] <= MAX_TOKENS


def parts_of(hidden: int, out: int) -> int:
    """Return into how many parts the hidden dimension is split, by the weights' shape alone."""
    wanted = -(-_BLOCKS // max(-(-out // _BLOCK_N), 1))
    chunks = -(-hidden // _CHUNK)
    size = -(-chunks // max(1, min(wanted, chunks // _LEAST_CHUNKS)))
    return -(-chunks // max(size, 1))


def hidden_activation(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w_up: Tensor | None,
    dropout: tuple[Tensor | None, str, int, float],
    saves: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the hidden activation (T, hidden), and where it `saves` the products, else None.

    `dropout` is what `dropout_arguments` returns. Without `w_up` the third result is None.
    """
    x, w1 = aligned(x), aligned(w1)
    w_up = None if w_up is None else aligned(w_up)
    act = x.new_empty(x.shape[0], w1.shape[0])
    pre = torch.empty_like(act) if saves else None
    up = torch.empty_like(act) if saves and w_up is not None else None
    library.ops().few_rows_hidden(x, w1, b1, w_up, act, pre, up, *dropout)
    return act, pre, up


def output(act: Tensor, w2: Tensor, b2: Tensor | None) -> Tensor:
    """Return the output (T, out) of the hidden activation; out is a multiple of 8."""
    y = act.new_empty(act.shape[0], w2.shape[0])
    parts = parts_of(act.shape[1], w2.shape[0])
    partial = act.new_empty((parts, *y.shape), dtype=torch.float32) if parts > 1 else None
    library.ops().few_rows_output(act, aligned(w2), b2, partial, y)
    return y
