"""Feed-forward blocks on the CPU: vendor matmuls, and only pre-activations kept for backward."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..philox import dropout_scale
from ..reference import apply_activation
from .dropout import keep_mask

_ATEN = torch.ops.aten


def _activation_gradient_(gradient: Tensor, pre: Tensor, activation: str) -> Tensor:
    """Turn the gradient of the activation in place into that of the pre-activation `pre`."""
    if activation == "relu":
        return _ATEN.threshold_backward.grad_input(gradient, pre, 0, grad_input=gradient)
    if activation == "silu":
        return _ATEN.silu_backward.grad_input(gradient, pre, grad_input=gradient)
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    return _ATEN.gelu_backward.grad_input(
        gradient, pre, approximate=approximate, grad_input=gradient
    )


def _keep(like: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor | None:
    """Return which hidden activations (T, hidden) dropout keeps, or None without dropout."""
    if dropout_p == 0:
        return None
    assert seed is not None
    rows, columns = (range(n) for n in like.shape)
    return keep_mask(seed, dropout_p, range(1), range(1), rows, columns)[0, 0]


def _drop_(x: Tensor, keep: Tensor | None, dropout_p: float) -> Tensor:
    """Apply dropout in place."""
    return x if keep is None else x.mul_(keep).mul_(dropout_scale(dropout_p))


def feed_forward_forward(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    seed: Tensor | None,
    activation: str,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """Return the output (T, width) and the pre-activation (T, hidden).

    For ReLU the hidden activations after dropout take its place: where they are above 0 the unit
    was active and kept, which is all that backward asks.
    """
    pre = F.linear(x, w1, b1)
    keep = _keep(pre, dropout_p, seed)
    hidden = pre.relu_() if activation == "relu" else apply_activation(pre, activation)
    return F.linear(_drop_(hidden, keep, dropout_p), w2, b2), pre


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
    """Return the gradients of x, w1, b1, w2 and b2; those of absent biases are None."""
    if activation == "relu":
        dw2 = dy.T @ pre
        dpre = _activation_gradient_(dy @ w2, pre, activation)
        if dropout_p:
            dpre.mul_(dropout_scale(dropout_p))
    else:
        keep = _keep(pre, dropout_p, seed)
        hidden = _drop_(apply_activation(pre, activation), keep, dropout_p)
        dw2 = dy.T @ hidden
        # The recomputed activation is as large as its gradient and no longer needed: fresh memory
        # would cost more in page faults than the activation costs in arithmetic.
        dhidden = _drop_(torch.mm(dy, w2, out=hidden), keep, dropout_p)
        dpre = _activation_gradient_(dhidden, pre, activation)
    db1 = None if b1 is None else dpre.sum(0)
    return dpre @ w1, dpre.T @ x, db1, dw2, dy.sum(0) if has_b2 else None


def gated_feed_forward_forward(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    seed: Tensor | None,
    activation: str,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output (T, width) and both products (T, hidden) that backward needs."""
    gate_pre, up = F.linear(x, w_gate), F.linear(x, w_up)
    hidden = apply_activation(gate_pre, activation).mul_(up)
    hidden = _drop_(hidden, _keep(hidden, dropout_p, seed), dropout_p)
    return F.linear(hidden, w_down), gate_pre, up


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
    """Return the gradients of x, w_gate, w_up and w_down."""
    gate = apply_activation(gate_pre, activation)
    keep = _keep(gate, dropout_p, seed)
    hidden = _drop_(gate * up, keep, dropout_p)
    dw_down = dy.T @ hidden
    # In the memory of what is no longer needed.
    dhidden = _drop_(torch.mm(dy, w_down, out=hidden), keep, dropout_p)
    dup = gate.mul_(dhidden)
    dgate = _activation_gradient_(dhidden.mul_(up), gate_pre, activation)
    return torch.addmm(dgate @ w_gate, dup, w_up), dgate.T @ x, dup.T @ x, dw_down
