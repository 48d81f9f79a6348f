"""Residual addition, dropout and normalisation in Triton, one kernel each way for all four ops.

Layer norm has a mean, RMS norm has none. Post-norm normalises the sum as it is: the sum is not
saved, backward forms it again from what autograd keeps anyway. Pre-norm rounds and returns the sum,
the next residual, and normalises what it has returned: backward reads that alone.

A program works on rows {i, i + 8}: one Philox call decides about both, so that no word is computed
twice.

Source: Ba, Kiros, Hinton, "Layer Normalization", 2016; Zhang and Sennrich, "Root Mean Square Layer
Normalization", 2019.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import KernelSpec, launch, recorded_launches

# ------------------------------------------------------------------------------------------------
# Configs
# ------------------------------------------------------------------------------------------------

# A row stays in registers; past this width backward would spill its two column sums.
MAX_WIDTH = 8192

# Programs of the backward pass, each with its own partial sums: enough for several per
# multiprocessor of a large GPU, few enough that the partial sums stay small beside the input.
_BACKWARD_PROGRAMS = 512


def row_config(width: int) -> tuple[int, int, int]:
    """Return (ROWS, BLOCK_N, warps) for rows of `width` values; raise `ValueError` if too wide.

    A thread owns 8 values of a pair of rows, 16 in the widest; beyond 4096 columns 32 values of a
    single row, since a thread of 8 warps may use twice the registers of one of 16.
    """
    if width > MAX_WIDTH:
        raise ValueError(f"x: got width {width}, expected at most {MAX_WIDTH} for the Triton norm")
    block_n = max(32, triton.next_power_of_2(width))
    rows = 2 if block_n <= 4096 else 1
    return rows, block_n, max(1, min(16, block_n // 128)) if rows == 2 else block_n // 1024


# ------------------------------------------------------------------------------------------------
# Device helpers
# ------------------------------------------------------------------------------------------------


@triton.jit
def _program_rows(index, ROWS: tl.constexpr):
    """Return the rows (ROWS,) of work item `index`: i and i + 8, or one."""
    if ROWS == 2:
        rows = index // 8 * 16 + index % 8 + 8 * tl.arange(0, 2)
    else:
        rows = index + tl.arange(0, 1)
    return rows


@triton.jit
def _row_keep(seed, rows, threshold, BLOCK_N: tl.constexpr):
    """Return which elements (ROWS, BLOCK_N) of `rows`, all with one Philox row, dropout keeps.

    The definition is that of `fuseformer.philox`, with head 1.
    """
    first = tl.min(rows, 0)
    columns = tl.arange(0, BLOCK_N // 4)  # (BLOCK_N / 4,)
    w0, w1, w2, w3 = tl.philox(
        seed,
        columns.to(tl.uint32),
        tl.full((BLOCK_N // 4,), first // 16 * 8 + first % 8, tl.uint32),
        tl.full((BLOCK_N // 4,), 1, tl.uint32),
        tl.full((BLOCK_N // 4,), 0, tl.uint32),
    )  # (BLOCK_N / 4,) each
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # (BLOCK_N / 4, 2, 2)
    # Decided before they are put in order: one byte travels per column instead of four.
    low = ((words & 0xFFFF) >= threshold).to(tl.uint8)
    high = ((words >> 16) >= threshold).to(tl.uint8)
    keeps = tl.reshape(low | (high << 1), (BLOCK_N // 32, 8, 2, 2))  # (.., col % 8, bit 1, bit 0)
    keeps = tl.reshape(tl.permute(keeps, (0, 2, 3, 1)), (BLOCK_N,))
    halves = (rows // 8 % 2).to(tl.uint8)  # (ROWS,)
    return ((keeps[None, :] >> halves[:, None]) & 1) != 0


@triton.jit
def _load_rows(ptr, offsets, inside):
    return tl.load(ptr + offsets, mask=inside, other=0.0).to(tl.float32)


# ------------------------------------------------------------------------------------------------
# Kernels
# ------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["tokens", "threshold"])
def add_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, total_ptr, mean_ptr, rstd_ptr, seed_ptr,
    tokens, eps, threshold, dropout_scale,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Normalise ``residual + dropout(x)`` of one or two rows: RMS norm where `mean_ptr` is None.

    Grid: (work items,). x, residual, y and total are (tokens, WIDTH) contiguous, mean and rstd
    (tokens,). Where there is a `total_ptr` the sum is stored there, and normalised as stored.
    """
    rows = _program_rows(tl.program_id(0), ROWS)  # (ROWS,)
    columns = tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    real = columns < WIDTH
    inside = (rows < tokens)[:, None] & real[None, :]
    offsets = rows.to(tl.int64)[:, None] * WIDTH + columns[None, :]  # (ROWS, BLOCK_N)
    total = _load_rows(x_ptr, offsets, inside)  # (ROWS, BLOCK_N)
    if seed_ptr is not None:
        keep = _row_keep(tl.load(seed_ptr), rows, threshold, BLOCK_N)
        total = tl.where(keep, total * dropout_scale, 0.0)
    total += _load_rows(residual_ptr, offsets, inside)
    if total_ptr is not None:
        rounded = total.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + offsets, rounded, mask=inside)
        total = rounded.to(tl.float32)
    centred = total
    if mean_ptr is not None:
        mean = tl.sum(total, 1) / WIDTH  # (ROWS,)
        tl.store(mean_ptr + rows, mean, mask=rows < tokens)
        centred = tl.where(real[None, :], total - mean[:, None], 0.0)  # (ROWS, BLOCK_N)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / WIDTH + eps)  # (ROWS,)
    tl.store(rstd_ptr + rows, rstd, mask=rows < tokens)
    y = centred * rstd[:, None]
    if weight_ptr is not None:
        y *= _load_rows(weight_ptr, columns, real)[None, :]
    if bias_ptr is not None:
        y += _load_rows(bias_ptr, columns, real)[None, :]
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens", "items", "threshold"])
def add_norm_gradient_kernel(
    dy_ptr, dtotal_ptr, x_ptr, residual_ptr, weight_ptr, mean_ptr, rstd_ptr, seed_ptr,
    dx_ptr, dresidual_ptr, dweight_ptr, dbias_ptr,
    tokens, items, threshold, dropout_scale,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Compute dx and dresidual of every row of its work items, and its share of dweight and dbias.

    Grid: (programs,); a program takes the items from its own index on in steps of the grid. dweight
    and dbias are (programs, WIDTH) float32 partial sums. Without a `residual_ptr` x is the sum
    itself, and `dtotal_ptr` may hold a gradient that flows into it past the norm. Without dropout
    dx is dresidual, and `dx_ptr` is None.
    """
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    real = columns < WIDTH
    dweight = tl.zeros((BLOCK_N,), tl.float32)
    dbias = tl.zeros((BLOCK_N,), tl.float32)
    seed = 0
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    for index in range(program, items, tl.num_programs(0)):
        rows = _program_rows(index, ROWS)  # (ROWS,)
        inside = (rows < tokens)[:, None] & real[None, :]
        offsets = rows.to(tl.int64)[:, None] * WIDTH + columns[None, :]  # (ROWS, BLOCK_N)
        if mean_ptr is not None:
            mean = tl.load(mean_ptr + rows, mask=rows < tokens, other=0.0)  # (ROWS,)
        rstd = tl.load(rstd_ptr + rows, mask=rows < tokens, other=0.0)  # (ROWS,)
        dy = _load_rows(dy_ptr, offsets, inside)  # (ROWS, BLOCK_N)
        normal = _load_rows(x_ptr, offsets, inside)  # (ROWS, BLOCK_N)
        if dtotal_ptr is not None:
            past = _load_rows(dtotal_ptr, offsets, inside)  # (ROWS, BLOCK_N)
        if residual_ptr is not None:
            if seed_ptr is not None:
                keep = _row_keep(seed, rows, threshold, BLOCK_N)
                normal = tl.where(keep, normal * dropout_scale, 0.0)
            normal += _load_rows(residual_ptr, offsets, inside)
        if mean_ptr is not None:
            normal -= mean[:, None]
        # Past the last row dy is 0, and with it all that follows; past the last column too.
        normal *= rstd[:, None]
        if dweight_ptr is not None:
            dweight += tl.sum(dy * normal, 0)
        if dbias_ptr is not None:
            dbias += tl.sum(dy, 0)
        # Loaded anew for every item: the cache has room for it, the registers have none.
        dnormal = dy  # (ROWS, BLOCK_N)
        if weight_ptr is not None:
            dnormal = dy * _load_rows(weight_ptr, columns, real)[None, :]
        along = tl.sum(dnormal * normal, 1) / WIDTH  # (ROWS,)
        # One expression each: steps of their own make the widest rows spill.
        if mean_ptr is not None:
            shift = tl.sum(dnormal, 1) / WIDTH  # (ROWS,)
            dtotal = (dnormal - normal * along[:, None] - shift[:, None]) * rstd[:, None]
        else:
            dtotal = (dnormal - normal * along[:, None]) * rstd[:, None]  # (ROWS, BLOCK_N)
        if dtotal_ptr is not None:
            dtotal += past
        tl.store(dresidual_ptr + offsets, dtotal.to(dresidual_ptr.dtype.element_ty), mask=inside)
        if dx_ptr is not None:
            if residual_ptr is None:
                keep = _row_keep(seed, rows, threshold, BLOCK_N)
            dtotal = tl.where(keep, dtotal * dropout_scale, 0.0)
            tl.store(dx_ptr + offsets, dtotal.to(dx_ptr.dtype.element_ty), mask=inside)
    partial = program.to(tl.int64) * WIDTH + columns  # (BLOCK_N,)
    if dweight_ptr is not None:
        tl.store(dweight_ptr + partial, dweight, mask=real)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + partial, dbias, mask=real)


# ------------------------------------------------------------------------------------------------
# Launchers
# ------------------------------------------------------------------------------------------------


def _shared_arguments(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, seed: Tensor | None, dropout_p: float
) -> tuple[dict[str, object], int, int]:
    """Return the arguments that both kernels take, the number of work items, and the warps."""
    tokens, width = x.shape
    rows, block_n, num_warps = row_config(width)
    threshold = round(dropout_p * 65536)
    arguments = {
        "x_ptr": x.contiguous(),
        "residual_ptr": None if residual is None else residual.contiguous(),
        "weight_ptr": None if weight is None else weight.contiguous(),
        "seed_ptr": seed,
        "tokens": tokens,
        "threshold": threshold,
        "dropout_scale": 0.0 if threshold == 65536 else 65536 / (65536 - threshold),
        "WIDTH": width,
        "ROWS": rows,
        "BLOCK_N": block_n,
    }
    # Pairs eight rows apart: sixteen rows are eight items, some of them past the end.
    items = tokens if rows == 1 else triton.cdiv(tokens, 16) * 8
    return arguments, items if width else 0, num_warps


def add_norm_forward(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    rms: bool,
    return_residual: bool,
    eps: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """Return the normalised sum, with `return_residual` the sum, unless `rms` the mean, and rstd.

    `x` and `residual` are (T, width), any strides; `weight` and `bias` (width,), each of which may
    be missing, and `residual` may be wider; `seed` is None without dropout. The first two results
    have the dtype of `residual`; the mean and `rstd`, the reciprocal deviation, are (T,) in
    float32. Raises `ValueError` past `MAX_WIDTH` columns.
    """
    arguments, items, num_warps = _shared_arguments(x, residual, weight, seed, dropout_p)
    y = residual.new_empty(x.shape)
    total = residual.new_empty(x.shape) if return_residual else None
    mean, rstd = (x.new_empty(x.shape[0], dtype=torch.float32) for _ in range(2))
    arguments |= {
        "bias_ptr": None if bias is None else bias.contiguous(),
        "y_ptr": y,
        "total_ptr": total,
        "mean_ptr": None if rms else mean,
        "rstd_ptr": rstd,
        "eps": float(eps),
    }
    launch(add_norm_kernel, (items,), arguments, num_warps=num_warps, num_stages=1)
    return y, total, None if rms else mean, rstd


def add_norm_backward(
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
) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor | None]:
    """Return the gradients of x, residual, weight and bias; those of absent parameters are None.

    Without a `residual` `x` is the sum that forward has returned, and `dtotal` its own gradient.
    Without dropout that of x is None, for that of the residual is the same. That of the bias has
    the dtype of the weight, or float32 without one.
    """
    arguments, items, num_warps = _shared_arguments(x, residual, weight, seed, dropout_p)
    dresidual = (x if residual is None else residual).new_empty(x.shape)
    dx = None if seed is None else x.new_empty(x.shape)
    programs = min(items, _BACKWARD_PROGRAMS)
    dweight, dbias = (
        x.new_empty(programs, x.shape[1], dtype=torch.float32) if asked else None
        for asked in (weight is not None, has_bias)
    )
    arguments |= {
        "dy_ptr": dy.contiguous(),
        "dtotal_ptr": None if dtotal is None else dtotal.contiguous(),
        "mean_ptr": mean,
        "rstd_ptr": rstd,
        "dx_ptr": dx,
        "dresidual_ptr": dresidual,
        "dweight_ptr": dweight,
        "dbias_ptr": dbias,
        "items": items,
    }
    launch(add_norm_gradient_kernel, (programs,), arguments, num_warps=num_warps, num_stages=1)
    kind = torch.float32 if weight is None else weight.dtype
    dweight, dbias = (None if d is None else d.sum(0).to(kind) for d in (dweight, dbias))
    return dx, dresidual, dweight, dbias


# ------------------------------------------------------------------------------------------------
# Specs
# ------------------------------------------------------------------------------------------------


def kernel_specs(family: str) -> Iterator[KernelSpec]:
    """Yield the launches of representative calls; the configs are the same for every `family`."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    for dtype, parameter_dtype, width, dropout_p, rms, return_residual in (
        (bf16, bf16, 32, 0.1, False, False),
        (bf16, fp32, 96, 0.0, False, True),
        (bf16, bf16, 512, 0.1, True, True),
        (bf16, fp32, 1000, 0.1, False, False),
        (fp16, fp16, 1024, 0.0, False, False),
        (bf16, bf16, 2048, 0.0, True, True),
        (bf16, bf16, 2048, 0.1, False, False),
        (fp32, fp32, 4096, 0.1, False, False),
        (fp16, fp32, 4096, 0.1, False, True),
        (bf16, bf16, 4096, 0.0, True, True),
        (fp32, fp32, 4096, 0.1, True, True),
        (bf16, bf16, 8192, 0.1, False, False),
        (bf16, bf16, 8192, 0.1, False, True),
        (fp32, fp32, 8192, 0.0, False, False),
        (fp32, fp32, 8192, 0.1, True, True),
        (bf16, bf16, 8192, 0.0, True, False),
    ):
        x = torch.empty(4096, width, dtype=dtype, device="meta")
        weight = torch.empty(width, dtype=parameter_dtype, device="meta")
        bias = None if rms else weight
        seed = torch.empty((), dtype=torch.int64, device="meta") if dropout_p else None
        with recorded_launches(family) as specs:
            y, total, mean, rstd = add_norm_forward(
                x, x, weight, bias, seed, rms, return_residual, 1e-5, dropout_p
            )
            saved = (x, x) if total is None else (total, None)
            add_norm_backward(y, total, *saved, weight, mean, rstd, seed, dropout_p, not rms)
        yield from specs
