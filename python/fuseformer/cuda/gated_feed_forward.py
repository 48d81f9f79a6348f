"""Gated feed-forward by the CUDA C++ kernels, with the signatures of the Triton ones.

Both first products are computed in one kernel, from one copy of the tokens, which ends in
activation, gate and dropout; the third product is the vendor's. A few tokens go forward by
`few_rows`. The products of the backward pass are the vendor's, and one kernel computes the
gradients of both first ones and the hidden activation anew.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import few_rows, library
from .attention import aligned
from .feed_forward import dropout_arguments, last_product


def saves_pre(width: int, out_width: int, dtype: torch.dtype) -> bool:
    """Return whether forward saves the first products for backward: there is no other regime."""
    return True


def gated_feed_forward_forward(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    seed: Tensor | None,
    activation: str,
    dropout_p: float,
    saves: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output (T, out), and both first products (T, hidden), or (0,) unless it `saves`.

    `x` is (T, width), `w_gate` and `w_up` (hidden, width), `w_down` (out, hidden).
    """
    dropout = dropout_arguments(seed, activation, dropout_p)
    gate_pre: Tensor | None
    up: Tensor | None
    if few_rows.serves(x):
        act, gate_pre, up = few_rows.hidden_activation(x, w_gate, None, w_up, dropout, saves)
    else:
        x, w_gate, w_up = aligned(x), aligned(w_gate), aligned(w_up)
        if w_gate.stride() != w_up.stride():
            w_gate, w_up = w_gate.contiguous(), w_up.contiguous()
        act = x.new_empty(x.shape[0], w_gate.shape[0])
        gate_pre, up = (torch.empty_like(act) if saves else None for _ in range(2))
        library.ops().gated_activation(x, w_gate, w_up, act, gate_pre, up, *dropout)
    y = last_product(act, w_down, None)
    if gate_pre is None or up is None:
        return y, x.new_empty(0), x.new_empty(0)
    return y, gate_pre, up


def gated_feed_forward_backward(
    dy: Tensor,
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    gate_pre: Tensor,
    up: Tensor,
    seed: Tensor | None,
    activation: str,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, w_gate, w_up and w_down; `gate_pre` and `up` are forward's."""
    if gate_pre.numel() != x.shape[0] * w_gate.shape[0]:  # forward may have saved nothing
        gate_pre, up = F.linear(x, w_gate), F.linear(x, w_up)
    dgate = dy @ w_down  # (T, hidden), so far the gradient of the hidden activation
    dup, act = torch.empty_like(dgate), torch.empty_like(dgate)
    dropout = dropout_arguments(seed, activation, dropout_p)
    library.ops().gated_gradient(dgate, gate_pre, up, dup, act, *dropout)
    dx = torch.addmm(dgate @ w_gate, dup, w_up)
    return dx, dgate.T @ x, dup.T @ x, dy.T @ act
