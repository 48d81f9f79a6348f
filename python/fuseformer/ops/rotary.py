"""Rotary position embedding: the public function and its custom ops."""

import importlib
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backends import choose_backend, record, request_for, requested_backend
from . import checks


def _kernels(backend: str) -> Any:
    package = {"triton": "fuseformer.kernels", "cpu": "fuseformer.cpu"}[backend]
    return importlib.import_module(f"{package}.rotary")


def _result_like(x: Tensor) -> Tensor:
    """Return an empty tensor laid out like `x`: heads beside positions stay so, without a copy."""
    return torch.empty_like(x) if x.stride(-1) == 1 else x.new_empty(x.shape)


@torch.library.custom_op("fuseformer::rotary", mutates_args=())
def _rotary(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    inverse: bool,
    interleaved: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    record(request_for("rotary", q, k, head_dim=q.shape[-1]), backend)
    q_out, k_out = _result_like(q), _result_like(k)
    _kernels(backend).rotate(q, k, q_out, k_out, cos, sin, inverse, interleaved)
    return q_out, k_out


@_rotary.register_fake
def _(q: Tensor, k: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _result_like(q), _result_like(k)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[2], inputs[3])
    ctx.options = inputs[4:]


def _backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Any, ...]:
    inverse, *options = ctx.options
    return (*_rotary(dq, dk, *ctx.saved_tensors, not inverse, *options), *(None,) * 5)


_rotary.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("fuseformer::rotary_inplace", mutates_args=("q", "k"))
def _rotary_inplace(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, backend: str
) -> None:
    record(request_for("rotary", q, k, head_dim=q.shape[-1]), backend)
    _kernels(backend).rotate(q, k, q, k, cos, sin, False, interleaved)


@_rotary_inplace.register_fake
def _(q: Tensor, k: Tensor, *rest: Any) -> None:
    return None


def _check_inplace(q: Tensor, k: Tensor) -> None:
    """Require tensors of one dtype that autograd does not follow, with memory of their own."""
    for name, x in (("q", q), ("k", k)):
        if torch.is_grad_enabled() and x.requires_grad:
            raise ValueError(
                f"{name}: got a tensor that requires a gradient, expected none for inplace=True; "
                "call it under torch.no_grad() or with inplace=False"
            )
        if x.stride(-1) != 1 or any(
            size > 1 and stride == 0 for size, stride in zip(x.shape, x.stride(), strict=True)
        ):
            raise ValueError(
                f"{name}: got strides {tuple(x.stride())}, expected for inplace=True a last one of "
                "1 and no expanded dimension"
            )
    if q is k:
        raise ValueError("k: got the same tensor as q, expected another one for inplace=True")
    if q.dtype != k.dtype:
        raise TypeError(f"k: got dtype {k.dtype}, expected {q.dtype} as q for inplace=True")


def rotary(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    inplace: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Return `q` and `k` with the first R dimensions of every head rotated by position.

    Shapes: `q` (B, H, S, D), `k` (B, Hkv, S, D), `cos` and `sin` (S, R/2) or (B, S, R/2) with R <=
    D; dimension i turns against i + R/2 or, with `interleaved`, dimension 2i against 2i + 1, and
    the dimensions past R pass through. `cos` and `sin` get no gradient. Returns two tensors of the
    shapes and dtypes of `q` and `k`, under autocast too, or with `inplace` `q` and `k` themselves,
    overwritten; autograd must not follow them then, nor may they overlap. Raises `ValueError` or
    `TypeError` that names the argument.

    Source: Su et al., "RoFormer", 2021, section 3.2, in the half-split layout of GPT-NeoX and
    Llama, or in interleaved pairs, as in the paper and GPT-J.
    """
    checks.tensor("q", q, 4)
    checks.tensor("k", k, 4, like=q)
    for index, what in ((0, "batch size"), (2, "length"), (3, "head dim")):
        if k.shape[index] != q.shape[index]:
            raise ValueError(f"k: got {what} {k.shape[index]}, expected {q.shape[index]} as in q")
    for name, table in (("cos", cos), ("sin", sin)):
        checks.tensor(name, table)
        checks.device(name, table, q)
        lead = (q.shape[2],) if table.ndim == 2 else (q.shape[0], q.shape[2])
        if tuple(table.shape[:-1]) != lead or 2 * table.shape[-1] > q.shape[-1]:
            raise ValueError(
                f"{name}: got shape {tuple(table.shape)}, expected (length, R/2) or "
                f"(batch, length, R/2) with length {q.shape[2]}, batch {q.shape[0]} and R at "
                f"most {q.shape[-1]}"
            )
    checks.shape("sin", sin, tuple(cos.shape), "the shape of cos")
    checks.boolean("interleaved", interleaved)
    checks.boolean("inplace", inplace)
    if inplace:
        _check_inplace(q, k)
    request = request_for(
        "rotary",
        q,
        k,
        head_dim=q.shape[-1],
        requested=requested_backend(backend),
    )
    name, _ = choose_backend(request)
    if name == "reference":
        record(request, name)
        turned = reference.rotary(q, k, cos, sin, interleaved=interleaved)
        return (q.copy_(turned[0]), k.copy_(turned[1])) if inplace else turned
    if inplace:
        _rotary_inplace(q, k, cos, sin, interleaved, name)
        return q, k
    return _rotary(q, k, cos, sin, False, interleaved, name)
