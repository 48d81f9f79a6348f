"""Vocabulary projection with its cross entropy: the public function and its custom op."""

import importlib
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backends import choose_backend, record, request_for, requested_backend
from . import checks
from .attention import lse_dtype, used_options
from .registration import autocast_dtype, present, register_autocast

REDUCTIONS = ("none", "sum", "mean")


def _kernels(backend: str) -> Any:
    package = {"triton": "fuseformer.kernels", "cpu": "fuseformer.cpu"}[backend]
    return importlib.import_module(f"{package}.cross_entropy")


@torch.library.custom_op("fuseformer::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    z_loss: float,
    reduction: str,
    compute_grads: bool,
    max_supervised: int | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    record(request_for("linear_cross_entropy", hidden, weight), backend)
    loss, lse, *gradients = _kernels(backend).linear_cross_entropy_forward(
        hidden,
        weight,
        bias,
        target,
        ignore_index,
        label_smoothing,
        softcap,
        z_loss,
        reduction,
        compute_grads,
        max_supervised,
    )
    dhidden, dweight, dbias = (present(g, hidden).contiguous() for g in gradients)
    return loss, lse, dhidden, dweight.to(lse.dtype), dbias.to(lse.dtype)


@_linear_cross_entropy.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    z_loss: float,
    reduction: str,
    compute_grads: bool,
    max_supervised: int | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    lse = hidden.new_empty(target.shape, dtype=lse_dtype(hidden))
    loss = torch.empty_like(lse) if reduction == "none" else lse.new_empty(())
    # float16 cannot hold what a loss scale is yet to multiply.
    wide = compute_grads and hidden.dtype == torch.float16
    dhidden = (lse if wide else hidden).new_empty(hidden.shape if compute_grads else (0,))
    dweight = lse.new_empty(weight.shape if compute_grads else (0,))
    dbias = lse.new_empty(bias.shape if compute_grads and bias is not None else (0,))
    return loss, lse, dhidden, dweight, dbias


@torch.library.custom_op("fuseformer::linear_cross_entropy_backward", mutates_args=())
def _linear_cross_entropy_backward(
    dloss: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    lse: Tensor,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    z_loss: float,
    reduction: str,
    max_supervised: int | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    options = (ignore_index, label_smoothing, softcap, z_loss, reduction, max_supervised)
    dhidden, dweight, dbias = _kernels(backend).linear_cross_entropy_backward(
        dloss, hidden, weight, bias, target, lse, *options
    )
    return dhidden.contiguous(), dweight.contiguous(), present(dbias, hidden)


@_linear_cross_entropy_backward.register_fake
def _(
    dloss: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    dbias = hidden.new_empty(0) if bias is None else torch.empty_like(bias)
    return hidden.new_empty(hidden.shape), weight.new_empty(weight.shape), dbias


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, target, *options, ctx.compute_grads, bound, ctx.backend = inputs
    options.append(bound)
    ctx.options, ctx.has_bias, ctx.dtype = options, bias is not None, hidden.dtype
    if ctx.compute_grads:
        ctx.save_for_backward(*output[2:])
    else:
        ctx.save_for_backward(hidden, weight, bias, target, output[1])
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, dloss: Tensor, *_: Any) -> tuple[Any, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "linear_cross_entropy: its gradients are formed beside the loss and cannot be "
            "differentiated again; pass backend='reference' for second derivatives"
        )
    if ctx.compute_grads:
        # The gradients of the reduced loss were formed beside it, while each chunk's logits lived.
        # One dimension, so that a scalar's dtype counts: the product is rounded once.
        factor = dloss.reshape(1)
        dhidden, dweight, dbias = ((g * factor).to(ctx.dtype) for g in ctx.saved_tensors)
    else:
        dhidden, dweight, dbias = _linear_cross_entropy_backward(
            dloss, *ctx.saved_tensors, *ctx.options, ctx.backend
        )
    return (dhidden, dweight, dbias if ctx.has_bias else None, *(None,) * 9)


_linear_cross_entropy.register_autograd(_backward, setup_context=_save)
register_autocast(_linear_cross_entropy, ("hidden", "weight", "bias"))


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    reduction: str = "mean",
    max_supervised: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Return the cross entropy of ``hidden @ weight.T + bias`` against `target`.

    Shapes: `hidden` (..., width), `weight` (classes, width), `bias` (classes,) or None, `target`
    (...) int64. Rows whose target is `ignore_index` cost nothing, and logits exist a chunk at a
    time. A `softcap` c replaces logits x by ``c * tanh(x / c)``; `z_loss` adds ``z_loss * lse**2``
    to the loss of each row that counts, lse being the log of the sum of its exponentials.

    How many rows count decides shapes, so that on a GPU a call, and the backward pass of the
    reduction "none", waits for the device. It does not where `max_supervised` says that no more
    rows than that count: that many are computed. If more do, loss and gradients are NaN. While a
    CUDA graph is captured it does not wait either, and computes all rows.

    Gradients are right under any loss scale; in float16 they are infinite only where they exceed
    its range (the reference backend rounds gradients of logits to float16, as PyTorch does).

    Returns a float32 scalar for the reductions "mean" (over the rows that count; NaN where none
    does) and "sum", or the loss of each row (...), 0 where ignored, for "none". Raises
    `ValueError` or `TypeError` that names the argument, on the CPU also for a class out of range
    and for more rows than `max_supervised`.

    Source: `torch.nn.functional.cross_entropy` for the loss; Chowdhery et al., "PaLM", 2022,
    section 5, for the z-loss; Hsu et al., "Liger Kernel", 2024, for forming the gradients beside
    the loss.
    """
    checks.tensor("hidden", hidden)
    checks.tensor("weight", weight, 2, like=hidden)
    if weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"weight: got shape {tuple(weight.shape)}, expected (classes, {hidden.shape[-1]})"
        )
    checks.integers("target", target, (torch.int64,), hidden)
    checks.shape("target", target, tuple(hidden.shape[:-1]), "hidden's leading dimensions")
    if bias is not None:
        checks.tensor("bias", bias, 1, like=hidden)
        checks.shape("bias", bias, (weight.shape[0],), "(classes,)")
    checks.one_of("reduction", reduction, REDUCTIONS)
    smoothing = checks.probability("label_smoothing", label_smoothing)
    cap = checks.softcap(softcap)
    penalty = checks.not_negative("z_loss", z_loss)
    bound = None if max_supervised is None else checks.count("max_supervised", max_supervised)
    dtype = autocast_dtype(hidden)
    request = request_for(
        "linear_cross_entropy",
        hidden,
        weight,
        options=used_options(softcap=cap, z_loss=penalty),
        requested=requested_backend(backend),
        dtype=dtype,
    )
    name, _ = choose_backend(request)
    rows, classes = hidden.reshape(-1, hidden.shape[-1]), target.reshape(-1)
    if name == "reference":
        record(request, name)
        loss = reference.linear_cross_entropy(
            rows.to(dtype),
            weight.to(dtype),
            classes,
            None if bias is None else bias.to(dtype),
            ignore_index=ignore_index,
            label_smoothing=smoothing,
            softcap=cap,
            z_loss=penalty,
            reduction=reduction,
        )
        if bound is not None:
            excess = (classes != ignore_index).sum() > bound
            loss = loss * torch.where(excess, float("nan"), 1.0)
    else:
        parameters = [t for t in (hidden, weight, bias) if t is not None]
        learns = torch.is_grad_enabled() and any(t.requires_grad for t in parameters)
        loss, *_ = _linear_cross_entropy(
            rows,
            weight,
            bias,
            classes,
            ignore_index,
            smoothing,
            cap,
            penalty,
            reduction,
            learns and reduction != "none",
            bound,
            name,
        )
    return loss.view(target.shape) if reduction == "none" else loss
