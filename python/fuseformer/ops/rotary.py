"""Rotary position embedding: the public function and its custom op."""

import importlib
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backends import choose_backend, record, request_for, requested_backend
from . import checks
from .registration import autocast_dtype, register_autocast


@torch.library.custom_op("fuseformer::rotary", mutates_args=())
def _rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool, backend: str
) -> tuple[Tensor, Tensor]:
    record(request_for("rotary", q, k, head_dim=q.shape[-1]), backend)
    package = {"triton": "fuseformer.kernels", "cpu": "fuseformer.cpu"}[backend]
    rotated = importlib.import_module(f"{package}.rotary").rotary_forward(q, k, cos, sin, inverse)
    return rotated[0].contiguous(), rotated[1].contiguous()


@_rotary.register_fake
def _(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool, backend: str
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[2], inputs[3])
    ctx.options = inputs[4:]


def _backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Any, ...]:
    inverse, backend = ctx.options
    return (*_rotary(dq, dk, *ctx.saved_tensors, not inverse, backend), None, None, None, None)


_rotary.register_autograd(_backward, setup_context=_save)
register_autocast(_rotary, ("q", "k"))


def rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Return `q` and `k` with the first R dimensions of every head rotated by position.

    Shapes: `q` (B, H, S, D), `k` (B, Hkv, S, D), `cos` and `sin` (S, R/2) or (B, S, R/2) with R <=
    D; dimension i turns against i + R/2 and the dimensions past R pass through. `cos` and `sin`
    get no gradient. Returns two tensors of the shapes of `q` and `k`. Raises `ValueError` or
    `TypeError`.

    Source: Su et al., "RoFormer", 2021, section 3.2, in the half-split layout of GPT-NeoX and
    Llama.
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
    dtype = autocast_dtype(q)
    request = request_for(
        "rotary",
        q,
        k,
        head_dim=q.shape[-1],
        requested=requested_backend(backend),
        dtype=dtype,
    )
    name, _ = choose_backend(request)
    if name == "reference":
        record(request, name)
        return reference.rotary(q.to(dtype), k.to(dtype), cos, sin)
    return _rotary(q, k, cos, sin, False, name)
