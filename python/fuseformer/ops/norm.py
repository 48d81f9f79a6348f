"""Residual addition, dropout and normalisation in one op: the public functions and custom ops."""

import importlib
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backends import choose_backend, record, request_for, requested_backend
from . import checks
from .attention import lse_dtype
from .registration import autocast_dtype, present, register_autocast, second_derivatives


def _kernels(backend: str) -> Any:
    package = {"triton": "fuseformer.kernels", "cpu": "fuseformer.cpu"}[backend]
    return importlib.import_module(f"{package}.norm")


@torch.library.custom_op("fuseformer::add_layer_norm", mutates_args=())
def _add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    eps: float,
    dropout_p: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    record(request_for("add_layer_norm", x), backend)
    return _kernels(backend).add_layer_norm_forward(x, residual, weight, bias, seed, eps, dropout_p)


@_add_layer_norm.register_fake
def _(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    mean, rstd = (x.new_empty(x.shape[:1], dtype=lse_dtype(x)) for _ in range(2))
    return torch.empty_like(x), mean, rstd


@torch.library.custom_op("fuseformer::add_layer_norm_backward", mutates_args=())
def _add_layer_norm_backward(
    dy: Tensor,
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    has_bias: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx, dresidual, dweight, dbias = _kernels(backend).add_layer_norm_backward(
        dy, x, residual, weight, mean, rstd, seed, dropout_p, has_bias
    )
    return dx, dresidual, dweight, present(dbias, x)


@_add_layer_norm_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    has_bias: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dbias = torch.empty_like(weight) if has_bias else x.new_empty(0)
    return torch.empty_like(x), torch.empty_like(residual), torch.empty_like(weight), dbias


def _save_layer(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, weight, bias, seed, eps, dropout_p, backend = inputs
    ctx.save_for_backward(x, residual, weight, output[1], output[2], seed)
    ctx.options, ctx.eps = (dropout_p, bias is not None, backend), eps
    ctx.mark_non_differentiable(*output[1:])


def _backward_layer(ctx: Any, dy: Tensor, *_: Any) -> tuple[Any, ...]:
    if torch.is_grad_enabled():
        *inputs, _, _, seed = ctx.saved_tensors

        def formula(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
            return reference.add_layer_norm(
                x, residual, weight, None, eps=ctx.eps, dropout_p=ctx.options[0], seed=seed
            )

        dbias = dy.sum(0).to(inputs[2].dtype) if ctx.options[1] else None
        return (*second_derivatives(formula, inputs, (dy,)), dbias, *(None,) * 4)
    dx, dresidual, dweight, dbias = _add_layer_norm_backward(
        dy.contiguous(), *ctx.saved_tensors, *ctx.options
    )
    return dx, dresidual, dweight, dbias if ctx.options[1] else None, None, None, None, None


_add_layer_norm.register_autograd(_backward_layer, setup_context=_save_layer)
register_autocast(_add_layer_norm, ("x", "residual"))


@torch.library.custom_op("fuseformer::add_rms_norm", mutates_args=())
def _add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    seed: Tensor | None,
    eps: float,
    dropout_p: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    record(request_for("add_rms_norm", x), backend)
    return _kernels(backend).add_rms_norm_forward(x, residual, weight, seed, eps, dropout_p)


@_add_rms_norm.register_fake
def _(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x), x.new_empty(x.shape[:1], dtype=lse_dtype(x))


@torch.library.custom_op("fuseformer::add_rms_norm_backward", mutates_args=())
def _add_rms_norm_backward(
    dy: Tensor,
    dnew_residual: Tensor,
    new_residual: Tensor,
    weight: Tensor,
    rstd: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return _kernels(backend).add_rms_norm_backward(
        dy, dnew_residual, new_residual, weight, rstd, seed, dropout_p
    )


@_add_rms_norm_backward.register_fake
def _(dy: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(dy), torch.empty_like(dy), torch.empty_like(arguments[2])


def _save_rms(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, _, weight, seed, eps, dropout_p, backend = inputs
    ctx.save_for_backward(output[1], weight, output[2], seed)
    ctx.options, ctx.eps = (dropout_p, backend), eps
    ctx.mark_non_differentiable(output[2])


def _backward_rms(ctx: Any, dy: Tensor, dnew_residual: Tensor, _: Any) -> tuple[Any, ...]:
    if torch.is_grad_enabled():
        total, weight, _, seed = ctx.saved_tensors
        zero = torch.zeros_like(total)

        def formula(total: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
            return reference.add_rms_norm(zero, total, weight, eps=ctx.eps)

        dtotal, dweight = second_derivatives(formula, (total, weight), (dy, dnew_residual))
        dx = None if dtotal is None else reference.dropout(dtotal, ctx.options[0], seed, 1)
        return dx, dtotal, dweight, None, None, None, None
    gradients = _add_rms_norm_backward(
        dy.contiguous(), dnew_residual.contiguous(), *ctx.saved_tensors, *ctx.options
    )
    return (*gradients, None, None, None, None)


_add_rms_norm.register_autograd(_backward_rms, setup_context=_save_rms)
register_autocast(_add_rms_norm, ("x", "residual"))


def _check(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    checks.tensor("x", x)
    checks.tensor("residual", residual, like=x)
    checks.shape("residual", residual, tuple(x.shape), "the shape of x")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None:
            checks.tensor(name, parameter, 1)
            checks.device(name, parameter, x)
            checks.shape(name, parameter, tuple(x.shape[-1:]), "(width,)")


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Return ``layer_norm(residual + dropout(x))``, the end of a post-LN sublayer.

    Shapes: `x` and `residual` (..., width), `weight` and `bias` (width,), in the dtype of `x` or in
    float32. Returns (..., width) in the dtype of `x`; sums are taken in float32. Raises
    `ValueError` or `TypeError` that names the argument.

    Source: Ba, Kiros, Hinton, "Layer Normalization", 2016.
    """
    _check(x, residual, weight, bias)
    eps = checks.finite("eps", eps, positive=True)
    p = checks.probability("dropout_p", dropout_p)
    dtype = autocast_dtype(x)
    request = request_for("add_layer_norm", x, requested=requested_backend(backend), dtype=dtype)
    name, _ = choose_backend(request)
    seed_tensor = checks.dropout_seed(seed, p, x)
    rows, residual_rows = (t.reshape(-1, x.shape[-1]) for t in (x, residual))
    if name == "reference":
        record(request, name)
        rows, residual_rows = rows.to(dtype), residual_rows.to(dtype)
        y = reference.add_layer_norm(
            rows, residual_rows, weight, bias, eps=eps, dropout_p=p, seed=seed_tensor
        )
    else:
        y, _, _ = _add_layer_norm(rows, residual_rows, weight, bias, seed_tensor, eps, p, name)
    return y.view(x.shape)


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    *,
    eps: float,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the RMS norm of ``residual + dropout(x)`` and that sum, the next residual (pre-LN).

    Shapes: `x` and `residual` (..., width), `weight` (width,). Returns two tensors (..., width) in
    the dtype of `x`. Raises `ValueError` or `TypeError` that names the argument.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.
    """
    _check(x, residual, weight, None)
    eps = checks.finite("eps", eps, positive=True)
    p = checks.probability("dropout_p", dropout_p)
    dtype = autocast_dtype(x)
    request = request_for("add_rms_norm", x, requested=requested_backend(backend), dtype=dtype)
    name, _ = choose_backend(request)
    seed_tensor = checks.dropout_seed(seed, p, x)
    rows, residual_rows = (t.reshape(-1, x.shape[-1]) for t in (x, residual))
    if name == "reference":
        record(request, name)
        rows, residual_rows = rows.to(dtype), residual_rows.to(dtype)
        y, total = reference.add_rms_norm(
            rows, residual_rows, weight, eps=eps, dropout_p=p, seed=seed_tensor
        )
    else:
        y, total, _ = _add_rms_norm(rows, residual_rows, weight, seed_tensor, eps, p, name)
    return y.view(x.shape), total.view(x.shape)
