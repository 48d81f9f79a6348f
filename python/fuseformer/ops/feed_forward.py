"""Plain and gated feed-forward blocks: the public functions and their custom ops."""

import importlib
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backends import Request, choose_backend, record, request_for, requested_backend
from . import checks
from .registration import autocast_dtype, laid_out, present, register_autocast, second_derivatives


def _kernels(backend: str, gated: bool = False) -> Any:
    """Return the module of a backend that serves the op; the CPU's two share one."""
    if backend == "cpu":
        return importlib.import_module("fuseformer.cpu.feed_forward")
    package = {"cuda": "cuda", "triton": "kernels"}[backend]
    return importlib.import_module(f"fuseformer.{package}.{'gated_' * gated}feed_forward")


def _saves_pre(request: Request, backend: str, gated: bool = False) -> bool:
    """Return whether forward saves first products for backward: not in the resident regime.

    Where no backward pass follows, CUDA C++ saves none: others would have them in memory anyway.
    """
    if backend == "cpu":
        return True
    width, out_width = request.shapes[0][-1], request.shapes[2][0]
    saves: bool = _kernels(backend, gated).saves_pre(width, out_width, request.dtype)
    return saves and (backend != "cuda" or request.trains)


def _saving(backend: str, saves_pre: bool) -> dict[str, bool]:
    """Return the argument by which the kernels of a backend save products or not, if they ask."""
    return {"saves": saves_pre} if backend == "cuda" else {}


def _rows(x: Tensor) -> Tensor:
    """Return `x` as a matrix, also where its last dimension is 0 and the first is to be found."""
    return x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0)


@torch.library.custom_op("fuseformer::feed_forward", mutates_args=())
def _feed_forward(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    seed: Tensor | None,
    activation: str,
    dropout_p: float,
    saves_pre: bool,
    trains: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    record(request_for("feed_forward", x, w1, w2, activation=activation, trains=trains), backend)
    saving = _saving(backend, saves_pre)
    y, pre = _kernels(backend).feed_forward_forward(
        x, w1, b1, w2, b2, seed, activation, dropout_p, **saving
    )
    return y, pre


@_feed_forward.register_fake
def _(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    seed: Tensor | None,
    activation: str,
    dropout_p: float,
    saves_pre: bool,
    trains: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    pre = x.new_empty(x.shape[0], w1.shape[0]) if saves_pre else x.new_empty(0)
    return x.new_empty(x.shape[0], w2.shape[0]), pre


@torch.library.custom_op("fuseformer::feed_forward_backward", mutates_args=())
def _feed_forward_backward(
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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dx, dw1, db1, dw2, db2 = _kernels(backend).feed_forward_backward(
        dy, x, w1, b1, w2, pre, seed, activation, dropout_p, has_b2
    )
    return laid_out(dx, x), dw1.contiguous(), present(db1, x), dw2.contiguous(), present(db2, x)


@_feed_forward_backward.register_fake
def _(
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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    db1 = x.new_empty(0 if b1 is None else b1.shape[0])
    db2 = x.new_empty(w2.shape[0] if has_b2 else 0)
    return torch.empty_like(x), w1.new_empty(w1.shape), db1, w2.new_empty(w2.shape), db2


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, w1, b1, w2, b2, seed, activation, dropout_p, _, _, backend = inputs
    ctx.save_for_backward(x, w1, b1, w2, seed, output[1])
    ctx.options = (activation, dropout_p, b2 is not None, backend)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, dy: Tensor, _: Any) -> tuple[Any, ...]:
    x, w1, b1, w2, seed, pre = ctx.saved_tensors
    activation, dropout_p, has_b2, backend = ctx.options
    if torch.is_grad_enabled():

        def formula(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor) -> Tensor:
            return reference.feed_forward(
                x, w1, b1, w2, None, activation=activation, dropout_p=dropout_p, seed=seed
            )

        gradients = second_derivatives(formula, (x, w1, b1, w2), (dy,))
        return (*gradients, dy.sum(0) if has_b2 else None, *(None,) * 6)
    dx, dw1, db1, dw2, db2 = _feed_forward_backward(
        dy.contiguous(), x, w1, b1, w2, pre, seed, activation, dropout_p, has_b2, backend
    )
    db1 = None if b1 is None else db1
    return (dx, dw1, db1, dw2, db2 if has_b2 else None, *(None,) * 6)


_feed_forward.register_autograd(_backward, setup_context=_save)
register_autocast(_feed_forward, ("x", "w1", "b1", "w2", "b2"))


def _check_weight(name: str, w: Tensor, x: Tensor, inputs: int) -> None:
    checks.tensor(name, w, 2, like=x)
    if w.shape[1] != inputs:
        raise ValueError(
            f"{name}: got shape {tuple(w.shape)}, expected (outputs, {inputs}) as in nn.Linear"
        )


def feed_forward(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    activation: str = "relu",
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Return ``dropout(activation(x @ w1.T + b1)) @ w2.T + b2``.

    Shapes: `x` (..., width), `w1` (hidden, width), `b1` (hidden,) or None, `w2` (out, hidden), `b2`
    (out,) or None; weights as in `nn.Linear`. `activation` is "relu", "gelu" (exact), "gelu_tanh"
    or "silu". Returns (..., out). Raises `ValueError` or `TypeError` that names the argument.

    Source: Vaswani et al., "Attention Is All You Need", 2017, equation 2.
    """
    checks.tensor("x", x)
    _check_weight("w1", w1, x, x.shape[-1])
    _check_weight("w2", w2, x, w1.shape[0])
    for label, b, w in (("b1", b1, w1), ("b2", b2, w2)):
        if b is not None:
            checks.tensor(label, b, 1, like=x)
            checks.shape(label, b, (w.shape[0],), "(outputs,)")
    checks.activation(activation)
    p = checks.probability("dropout_p", dropout_p)
    dtype = autocast_dtype(x)
    request = request_for(
        "feed_forward",
        x,
        w1,
        w2,
        requested=requested_backend(backend),
        dtype=dtype,
        trained=tuple(b for b in (b1, b2) if b is not None),
        activation=activation,
    )
    name, _ = choose_backend(request)
    seed_tensor = checks.dropout_seed(seed, p, x)
    rows = _rows(x)
    if name == "reference":
        record(request, name)
        rows, w1, w2 = rows.to(dtype), w1.to(dtype), w2.to(dtype)
        b1, b2 = (None if b is None else b.to(dtype) for b in (b1, b2))
        y = reference.feed_forward(
            rows, w1, b1, w2, b2, activation=activation, dropout_p=p, seed=seed_tensor
        )
    else:
        saving = (_saves_pre(request, name), request.trains)
        y, _ = _feed_forward(rows, w1, b1, w2, b2, seed_tensor, activation, p, *saving, name)
    return y.view(*x.shape[:-1], w2.shape[0])


@torch.library.custom_op("fuseformer::gated_feed_forward", mutates_args=())
def _gated_feed_forward(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    seed: Tensor | None,
    activation: str,
    dropout_p: float,
    saves_pre: bool,
    trains: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    request = request_for(
        "gated_feed_forward", x, w_gate, w_down, activation=activation, trains=trains
    )
    record(request, backend)
    return _kernels(backend, gated=True).gated_feed_forward_forward(
        x, w_gate, w_up, w_down, seed, activation, dropout_p, **_saving(backend, saves_pre)
    )


@_gated_feed_forward.register_fake
def _(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    seed: Tensor | None,
    activation: str,
    dropout_p: float,
    saves_pre: bool,
    trains: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    hidden = (x.shape[0], w_gate.shape[0]) if saves_pre else (0,)
    return x.new_empty(x.shape[0], w_down.shape[0]), x.new_empty(hidden), x.new_empty(hidden)


@torch.library.custom_op("fuseformer::gated_feed_forward_backward", mutates_args=())
def _gated_feed_forward_backward(
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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx, *weights = _kernels(backend, gated=True).gated_feed_forward_backward(
        dy, x, w_gate, w_up, w_down, gate_pre, up, seed, activation, dropout_p
    )
    dw_gate, dw_up, dw_down = (w.contiguous() for w in weights)
    return laid_out(dx, x), dw_gate, dw_up, dw_down


@_gated_feed_forward_backward.register_fake
def _(dy: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, w_gate, w_up, w_down = arguments[:4]
    return (torch.empty_like(x), *(w.new_empty(w.shape) for w in (w_gate, w_up, w_down)))


def _save_gated(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, w_gate, w_up, w_down, seed, activation, dropout_p, _, _, backend = inputs
    ctx.save_for_backward(x, w_gate, w_up, w_down, *output[1:], seed)
    ctx.options = (activation, dropout_p, backend)
    ctx.mark_non_differentiable(*output[1:])


def _backward_gated(ctx: Any, dy: Tensor, *_: Any) -> tuple[Any, ...]:
    activation, dropout_p, _ = ctx.options
    if torch.is_grad_enabled():
        *inputs, _, _, seed = ctx.saved_tensors

        def formula(*inputs: Any) -> Tensor:
            return reference.gated_feed_forward(
                *inputs, activation=activation, dropout_p=dropout_p, seed=seed
            )

        return (*second_derivatives(formula, inputs, (dy,)), *(None,) * 6)
    gradients = _gated_feed_forward_backward(dy.contiguous(), *ctx.saved_tensors, *ctx.options)
    return (*gradients, *(None,) * 6)


_gated_feed_forward.register_autograd(_backward_gated, setup_context=_save_gated)
register_autocast(_gated_feed_forward, ("x", "w_gate", "w_up", "w_down"))


def gated_feed_forward(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    *,
    activation: str = "silu",
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Return ``dropout(activation(x @ w_gate.T) * (x @ w_up.T)) @ w_down.T``.

    Shapes: `x` (..., width), `w_gate` and `w_up` (hidden, width), `w_down` (out, hidden), as in
    `nn.Linear`. `activation` is one of those of `feed_forward`. Returns (..., out). Raises
    `ValueError` or `TypeError` that names the argument.

    Source: Shazeer, "GLU Variants Improve Transformer", 2020.
    """
    checks.tensor("x", x)
    _check_weight("w_gate", w_gate, x, x.shape[-1])
    _check_weight("w_up", w_up, x, x.shape[-1])
    checks.shape("w_up", w_up, tuple(w_gate.shape), "the shape of w_gate")
    _check_weight("w_down", w_down, x, w_gate.shape[0])
    checks.activation(activation)
    p = checks.probability("dropout_p", dropout_p)
    dtype = autocast_dtype(x)
    request = request_for(
        "gated_feed_forward",
        x,
        w_gate,
        w_down,
        requested=requested_backend(backend),
        dtype=dtype,
        trained=(w_up,),
        activation=activation,
    )
    name, _ = choose_backend(request)
    seed_tensor = checks.dropout_seed(seed, p, x)
    rows = _rows(x)
    if name == "reference":
        record(request, name)
        y = reference.gated_feed_forward(
            *(t.to(dtype) for t in (rows, w_gate, w_up, w_down)),
            activation=activation,
            dropout_p=p,
            seed=seed_tensor,
        )
    else:
        saving = (_saves_pre(request, name, gated=True), request.trains)
        y, _, _ = _gated_feed_forward(
            rows, w_gate, w_up, w_down, seed_tensor, activation, p, *saving, name
        )
    return y.view(*x.shape[:-1], w_down.shape[0])
