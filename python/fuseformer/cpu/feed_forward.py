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


def _drop_(x: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor:
    """Apply the dropout of hidden activations (T, hidden) in place."""
    if dropout_p > 0:
        assert seed is not None
        keep = keep_mask(seed, dropout_p, range(1), range(1), range(x.shape[0]), range(x.shape[1]))
        x.mul_(keep[0, 0]).mul_(dropout_scale(dropout_p))
    return x


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

    ReLU's is clamped at 0, which changes neither the activation nor its gradient and makes one
    tensor serve as both.
    """
    pre = F.linear(x, w1, b1)
    if activation == "relu":
        pre.relu_()
    return F.linear(_hidden(pre, seed, activation, dropout_p), w2, b2), pre


def _hidden(pre: Tensor, seed: Tensor | None, activation: str, dropout_p: float) -> Tensor:
    """Return the activation of `pre` after dropout; `pre` itself where that is the same."""
    if activation != "relu":
        return _drop_(apply_activation(pre, activation), dropout_p, seed)
    return _drop_(pre.clone(), dropout_p, seed) if dropout_p else pre


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
    hidden = _hidden(pre, seed, activation, dropout_p)
    dw2 = dy.T @ hidden
    # The recomputed activation is as large as its gradient and no longer needed: fresh memory would
    # cost more in page faults than the activation costs in arithmetic.
    dhidden = torch.mm(dy, w2) if hidden is pre else torch.mm(dy, w2, out=hidden)
    dpre = _activation_gradient_(_drop_(dhidden, dropout_p, seed), pre, activation)
    db1 = None if b1 is None else dpre.sum(0)
    return dpre @ w1, dpre.T @ x, db1, dw2, dy.sum(0) if has_b2 else None


def gated_feed_forward_forward(
    x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output (T, width) and both products (T, hidden) that backward needs."""
    gate_pre, up = F.linear(x, w_gate), F.linear(x, w_up)
    return F.linear(apply_activation(gate_pre, activation).mul_(up), w_down), gate_pre, up


def gated_feed_forward_backward(
    dy: Tensor,
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    gate_pre: Tensor,
    up: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, w_gate, w_up and w_down."""
    gate = apply_activation(gate_pre, activation)
    hidden = gate * up
    dw_down = dy.T @ hidden
    dhidden = torch.mm(dy, w_down, out=hidden)  # in the memory of what is no longer needed
    dup = gate.mul_(dhidden)
    dgate = _activation_gradient_(dhidden.mul_(up), gate_pre, activation)
    return torch.addmm(dgate @ w_gate, dup, w_up), dgate.T @ x, dup.T @ x, dw_down
