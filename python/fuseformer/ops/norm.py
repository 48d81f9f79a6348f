"""Residual addition, dropout and normalisation in one op: public functions, custom op."""

import importlib
from typing import Any, Literal, overload

import torch
from torch import Tensor

from .. import reference
from ..backends import choose_backend, record, request_for, requested_backend
from . import checks
from .attention import lse_dtype
from .registration import autocast_float_dtype, present, second_derivatives


def _kernels(backend: str) -> Any:
    package = {"triton": "fuseformer.kernels", "cpu": "fuseformer.cpu"}[backend]
    return importlib.import_module(f"{package}.norm")


@torch.library.custom_op("fuseformer::add_norm", mutates_args=())
def _add_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    rms: bool,
    return_residual: bool,
    eps: float,
    dropout_p: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    record(request_for("add_rms_norm" if rms else "add_layer_norm", residual), backend)
    y, total, mean, rstd = _kernels(backend).add_norm_forward(
        x, residual, weight, bias, seed, rms, return_residual, eps, dropout_p
    )
    return y.contiguous(), present(total, residual).contiguous(), present(mean, rstd), rstd


@_add_norm.register_fake
def _(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    rms: bool,
    return_residual: bool,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total = residual.new_empty(x.shape if return_residual else (0,))
    rstd = x.new_empty(x.shape[:1], dtype=lse_dtype(x))
    mean = rstd.new_empty(0) if rms else torch.empty_like(rstd)
    return residual.new_empty(x.shape), total, mean, rstd


@torch.library.custom_op("fuseformer::add_norm_backward", mutates_args=())
def _add_norm_backward(
    dy: Tensor,
    dtotal: Tensor | None,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    has_bias: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx, dresidual, dweight, dbias = _kernels(backend).add_norm_backward(
        dy, dtotal, x, residual, weight, mean, rstd, seed, dropout_p, has_bias
    )
    absent = rstd if weight is None else weight
    dweight, dbias = present(dweight, absent), present(dbias, absent)
    return present(dx, x).contiguous(), dresidual.contiguous(), dweight, dbias


@_add_norm_backward.register_fake
def _(
    dy: Tensor,
    dtotal: Tensor | None,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    has_bias: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx = x.new_empty((0,) if seed is None else x.shape)
    dresidual = (x if residual is None else residual).new_empty(x.shape)
    kind, width = (rstd if weight is None else weight), x.shape[-1:]
    dweight = kind.new_empty((0,) if weight is None else width)
    return dx, dresidual, dweight, kind.new_empty(width if has_bias else (0,))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, weight, bias, seed, *ctx.options = inputs
    _, total, mean, rstd = output
    rms, return_residual = ctx.options[:2]
    summands = (total, None) if return_residual else (x, residual)
    ctx.save_for_backward(*summands, weight, None if rms else mean, rstd, seed)
    ctx.dtypes = x.dtype, None if bias is None else bias.dtype
    ctx.mark_non_differentiable(*([] if return_residual else [total]), mean, rstd)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, dtotal: Tensor | None, *_: Any) -> tuple[Any, ...]:
    x, residual, weight, mean, rstd, seed = ctx.saved_tensors
    rms, return_residual, eps, dropout_p, backend = ctx.options
    dtype, bias_dtype = ctx.dtypes
    if dy is None and dtotal is None:
        return (None,) * 10
    dy = torch.zeros_like(x) if dy is None else dy
    if torch.is_grad_enabled():
        p = 0.0 if return_residual else dropout_p

        def formula(x: Tensor, residual: Tensor, weight: Tensor | None) -> tuple[Tensor, ...]:
            options = {"rms": rms, "return_residual": return_residual, "eps": eps}
            return reference.add_norm(x, residual, weight, None, dropout_p=p, seed=seed, **options)

        inputs = (torch.zeros_like(x), x, weight) if return_residual else (x, residual, weight)
        gradients = (dy, dtotal) if return_residual else (dy,)
        dx, dresidual, dweight = second_derivatives(formula, inputs, gradients)
        if return_residual and dresidual is not None:
            dx = reference.dropout(dresidual, dropout_p, seed, 1)
        dbias = dy.sum(0)
    else:
        gradient, dresidual, found, dbias = _add_norm_backward(
            dy,
            dtotal,
            x,
            residual,
            weight,
            mean,
            rstd,
            seed,
            dropout_p,
            bias_dtype is not None,
            backend,
        )
        dx = dresidual if seed is None else gradient
        dweight = None if weight is None else found
    dx = None if dx is None else dx.to(dtype)
    shift = None if bias_dtype is None else dbias.to(bias_dtype)
    return dx, dresidual, dweight, shift, *(None,) * 6


_add_norm.register_autograd(_backward, setup_context=_save)


def _checked_add_norm(
    op: str,
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dropout_p: float,
    seed: int | Tensor | None,
    return_residual: bool,
    backend: str | None,
) -> Any:
    """Check the arguments of the public function `op`, choose a backend and return its results."""
    checks.tensor("x", x)
    checks.tensor("residual", residual)
    checks.device("residual", residual, x)
    checks.shape("residual", residual, tuple(x.shape), "the shape of x")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None:
            checks.tensor(name, parameter, 1)
            checks.device(name, parameter, x)
            checks.shape(name, parameter, tuple(x.shape[-1:]), "(width,)")
    eps = checks.finite("eps", eps, positive=True)
    p = checks.probability("dropout_p", dropout_p)
    checks.boolean("return_residual", return_residual)
    kind = x.dtype if x.dtype == residual.dtype else torch.promote_types(x.dtype, residual.dtype)
    dtype = autocast_float_dtype(x, kind)
    # The sum and its norm come in the dtype of the residual; the kernels widen x themselves.
    residual = residual if residual.dtype == dtype else residual.to(dtype)
    request = request_for(op, residual, requested=requested_backend(backend), dtype=dtype)
    name, _ = choose_backend(request)
    seed_tensor = checks.dropout_seed(seed, p, x)
    rows, residual_rows = (t.reshape(-1, x.shape[-1]) for t in (x, residual))
    rms = op == "add_rms_norm"
    results: tuple[Tensor, ...]
    if name == "reference":
        record(request, name)
        results = reference.add_norm(
            rows,
            residual_rows,
            weight,
            bias,
            rms=rms,
            return_residual=return_residual,
            eps=eps,
            dropout_p=p,
            seed=seed_tensor,
        )
    else:
        results = _add_norm(
            rows, residual_rows, weight, bias, seed_tensor, rms, return_residual, eps, p, name
        )
    y = results[0].view(x.shape)
    return (y, results[1].view(x.shape).to(kind)) if return_residual else y


@overload
def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float = ...,
    dropout_p: float = ...,
    seed: int | Tensor | None = ...,
    return_residual: Literal[False] = ...,
    backend: str | None = ...,
) -> Tensor: ...


@overload
def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float = ...,
    dropout_p: float = ...,
    seed: int | Tensor | None = ...,
    return_residual: bool,
    backend: str | None = ...,
) -> Any: ...


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    return_residual: bool = False,
    backend: str | None = None,
) -> Any:
    """Return ``layer_norm(residual + dropout(x))``, the end of a post-LN sublayer.

    Shapes: `x` and `residual` (..., width), `weight` and `bias` (width,), each of which may be
    None, in the dtype of `x` or in float32. Returns (..., width) in the dtype of ``residual + x``,
    or where autocast has `F.layer_norm` give float32 in that; sums are taken in float32. With
    `return_residual` it is the start of a pre-LN sublayer: the sum is rounded to its dtype,
    normalised as rounded, and returned too, as (y, residual). Raises `ValueError` or `TypeError`
    that names the argument.

    Source: Ba, Kiros, Hinton, "Layer Normalization", 2016.
    """
    options = (eps, dropout_p, seed, return_residual, backend)
    return _checked_add_norm("add_layer_norm", x, residual, weight, bias, *options)


@overload
def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    *,
    eps: float,
    dropout_p: float = ...,
    seed: int | Tensor | None = ...,
    return_residual: Literal[True] = ...,
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...


@overload
def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    *,
    eps: float,
    dropout_p: float = ...,
    seed: int | Tensor | None = ...,
    return_residual: bool,
    backend: str | None = ...,
) -> Any: ...


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    *,
    eps: float,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    return_residual: bool = True,
    backend: str | None = None,
) -> Any:
    """Return the RMS norm of ``residual + dropout(x)`` and that sum, the next residual (pre-LN).

    Shapes: `x` and `residual` (..., width), `weight` (width,) or None, in the dtype of `x` or in
    float32. Returns two tensors (..., width), the second in the dtype of ``residual + x``, rounded
    before it is normalised, the first in the same or where autocast has `F.rms_norm` give float32
    in that. Without `return_residual` it is the end of a post-LN sublayer: the sum is normalised
    as it is, and only the norm returned. Raises `ValueError` or `TypeError` that names the
    argument.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.
    """
    options = (eps, dropout_p, seed, return_residual, backend)
    return _checked_add_norm("add_rms_norm", x, residual, weight, None, *options)
