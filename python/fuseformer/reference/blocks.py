"""Feed-forward, norm, loss and rotary position embedding in plain, differentiable PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .numerics import apply_activation, dropout, widened


def feed_forward(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    activation: str,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Return ``dropout(activation(x @ w1.T + b1)) @ w2.T + b2`` for `x` (T, width)."""
    hidden = apply_activation(F.linear(x, w1, b1), activation)
    return F.linear(dropout(hidden, dropout_p, seed, 0), w2, b2)


def gated_feed_forward(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    *,
    activation: str,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Return ``dropout(activation(x @ w_gate.T) * (x @ w_up.T)) @ w_down.T`` for `x` (T, width).

    Source: Shazeer, "GLU Variants Improve Transformer", 2020.
    """
    hidden = apply_activation(F.linear(x, w_gate), activation) * F.linear(x, w_up)
    return F.linear(dropout(hidden, dropout_p, seed, 0), w_down)


def add_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    rms: bool,
    return_residual: bool,
    eps: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Return the norm of ``residual + dropout(x)`` over the last dimension of `x` (T, width).

    It is a layer norm or, without a mean and a bias, an RMS norm. Results have the dtype of
    `residual`. With `return_residual` the sum is rounded to it before it is normalised, and
    returned too.

    Source: Ba, Kiros, Hinton, "Layer Normalization", 2016; Zhang and Sennrich, "Root Mean Square
    Layer Normalization", 2019.
    """
    total = widened(residual) + dropout(widened(x), dropout_p, seed, 1)
    rounded = total.to(residual.dtype)
    if return_residual:
        total = widened(rounded)
    shape = x.shape[-1:]
    wide, shift = (None if p is None else p.to(total.dtype) for p in (weight, bias))
    if rms:
        y = F.rms_norm(total, shape, wide, eps)
    else:
        y = F.layer_norm(total, shape, wide, shift, eps)
    return (y.to(residual.dtype), rounded) if return_residual else (y.to(residual.dtype),)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Return the cross entropy of ``hidden @ weight.T + bias`` (T, V) against `target` (T,).

    Each row that counts costs ``z_loss * lse**2`` more.

    Source: Chowdhery et al., "PaLM", 2022, section 5, for the z-loss.
    """
    logits = widened(F.linear(hidden, weight, bias))
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    loss = F.cross_entropy(
        logits,
        target,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction=reduction,
    )
    if not z_loss:
        return loss
    supervised = target != ignore_index
    penalty = z_loss * torch.where(supervised, logits.logsumexp(-1), 0.0).square()
    if reduction == "none":
        return loss + penalty
    return loss + penalty.sum() / (supervised.sum() if reduction == "mean" else 1)


def rotated_parts(x: Tensor, half: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Return views (..., R/2) of both sides of the pairs that turn in `x` (..., D), R / 2 = half.

    Dimension i turns against i + R/2 or, where `interleaved`, 2i against 2i + 1.
    """
    if interleaved:
        return x[..., : 2 * half : 2], x[..., 1 : 2 * half : 2]
    return x[..., :half], x[..., half : 2 * half]


def rotate(
    x: Tensor, cos: Tensor, sin: Tensor, *, inverse: bool = False, interleaved: bool = False
) -> Tensor:
    """Return `x` (B, H, S, D) with its first R dimensions rotated by the position's angles.

    `cos` and `sin` are (S, R/2) or (B, S, R/2); which dimensions turn against each other is said in
    `rotated_parts`, those past R pass through. `inverse` rotates back.

    Source: Su et al., "RoFormer", 2021, section 3.2, in the half-split layout of GPT-NeoX and
    Llama, or in interleaved pairs, as in the paper and GPT-J.
    """
    half = cos.shape[-1]
    cos, sin = (t.unsqueeze(-3).to(widened(x).dtype) for t in (cos, sin))  # (1 or B, 1, S, R/2)
    if inverse:
        sin = -sin
    first, second = rotated_parts(widened(x), half, interleaved)
    turned = [first * cos - second * sin, second * cos + first * sin]
    joined = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    return torch.cat([joined, widened(x)[..., 2 * half :]], -1).to(x.dtype)


def rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    """Return `q` and `k` with rotary position embedding; shapes as in `rotate`."""
    return (
        rotate(q, cos, sin, interleaved=interleaved),
        rotate(k, cos, sin, interleaved=interleaved),
    )
