"""Attention over packed sequences on the CPU: each sequence by itself, so padding costs nothing."""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ..reference import bias_of_sequence, widened
from .attention import backward, forward, options_of, shaped_like
from .attention_blocks import Options

# Sequences whose lengths differ by less share a batch where dropout is drawn: a patch of its
# generator has 16 rows and 32 columns, so that a finer step would save nothing.
_LENGTH_STEP = 32


class _Group(NamedTuple):
    """Sequences that are computed together, as a dense batch: their numbers, and their rows.

    `rows` (N, L) are rows of the packed tensor, `real` (N, L) tells them from padding; None where
    nothing is padded. `columns` are the keys' rows, `key_lengths` (N,) int32 where keys are padded.
    """

    numbers: list[int]
    rows: Tensor
    real: Tensor | None
    columns: Tensor
    real_columns: Tensor | None
    key_lengths: Tensor | None


def _indices(starts: list[int], numbers: list[int], length: int) -> tuple[Tensor, Tensor | None]:
    """Return the rows (N, length) of some sequences, the last one repeated, and which are real."""
    begin = torch.tensor([starts[n] for n in numbers])[:, None]
    end = torch.tensor([starts[n + 1] for n in numbers])[:, None]
    rows = begin + torch.arange(length)
    real = rows < end
    return torch.minimum(rows, end - 1), None if bool(real.all()) else real


def _groups(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, options: Options) -> Iterator[_Group]:
    """Yield the sequences in groups of alike length, padded by less than `_LENGTH_STEP` rows.

    Short sequences by themselves would cost more in calls than in arithmetic.
    """
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    # With the last query at the last key, the diagonal depends on both lengths.
    step = 1 if options.causal == "bottom_right" else _LENGTH_STEP
    alike: dict[tuple[int, int], list[int]] = {}
    for n in range(len(starts_q) - 1):
        sizes = (starts_q[n + 1] - starts_q[n], starts_k[n + 1] - starts_k[n])
        sq, sk = (-(-size // step) * step for size in sizes)
        alike.setdefault((sq, sk), []).append(n)
    for (sq, sk), numbers in alike.items():
        rows, real = _indices(starts_q, numbers, sq)
        columns, real_columns = _indices(starts_k, numbers, sk)
        lengths = None if real_columns is None else real_columns.sum(1, dtype=torch.int32)
        yield _Group(numbers, rows, real, columns, real_columns, lengths)


def _sequences(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> Iterator[tuple[slice, slice]]:
    """Yield the query rows and the key rows of each packed sequence."""
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for n in range(len(starts_q) - 1):
        yield slice(starts_q[n], starts_q[n + 1]), slice(starts_k[n], starts_k[n + 1])


def _check(side: str, cu_seqlens: Tensor, total: int, longest: int) -> None:
    """Raise `ValueError` unless the offsets start at 0, do not fall, and end at `total`.

    Neither may a sequence be longer than `longest`.
    """
    name, values = f"cu_seqlens_{side}", cu_seqlens.tolist()
    if values[0] != 0 or values[-1] != total or any(a > b for a, b in itertools.pairwise(values)):
        raise ValueError(
            f"{name}: got {values[:4]}..{values[-1]}, expected offsets that start at 0, never fall "
            f"and end at the number of packed tokens, {total}"
        )
    found = max((b - a for a, b in itertools.pairwise(values)), default=0)
    if found > longest:
        raise ValueError(
            f"max_seqlen_{side}: got {longest}, expected at least the longest sequence, {found}"
        )


def _group_bias(bias: Tensor | None, group: _Group) -> Tensor | None:
    """Return the bias of a group, with zeros in places that only padding has."""
    if bias is None:
        return None
    bias = bias[group.numbers] if bias.shape[0] > 1 else bias
    for dim, size in ((2, group.rows.shape[1]), (3, group.columns.shape[1])):
        if bias.shape[dim] > 1:
            bias = bias.narrow(dim, 0, min(size, bias.shape[dim]))
            missing = [0, 0] * (3 - dim) + [0, size - bias.shape[dim]]
            bias = functional.pad(bias, missing)
    return bias


def _add_bias_gradient(total: Tensor, part: Tensor, numbers: list[int]) -> None:
    """Add the gradient of the bias of some sequences to that of the whole, `total`.

    What `part` has beyond `total` along queries or keys is padding.
    """
    sq, sk = (min(a, b) for a, b in zip(total.shape[2:], part.shape[2:], strict=True))
    part = part[:, :, :sq, :sk]
    if total.shape[0] > 1:
        total[numbers, :, :sq, :sk] += part
    else:
        total[:, :, :sq, :sk] += part


def _one(x: Tensor, rows: slice) -> Tensor:
    return x[rows].transpose(0, 1)[None]  # (1, H, S, D)


def _batch(x: Tensor, rows: Tensor, real: Tensor | None = None) -> Tensor:
    """Return rows (N, L) of `x` (T, H, ...) as (N, H, L, ...), zeros in those that are not real."""
    batch = x[rows]
    if real is not None:
        batch[~real] = 0
    return batch.transpose(1, 2)


def _put(x: Tensor, rows: Tensor, real: Tensor | None, batch: Tensor) -> None:
    """Write the real rows of `batch` (N, H, L, ...) where they belong in `x` (T, H, ...)."""
    values = batch.transpose(1, 2)
    if real is None:
        x[rows] = values
    else:
        x[rows[real]] = values[real]


def varlen_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
    causal: str,
    window_left: int,
    window_right: int,
    softcap: float,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """Return the output (Tq, H, D) and lse (H, Tq) of attention within packed sequences."""
    _check("q", cu_seqlens_q, q.shape[0], max_seqlen_q)
    _check("k", cu_seqlens_k, k.shape[0], max_seqlen_k)
    out = torch.empty_like(q)
    lse = torch.empty(
        q.shape[1], q.shape[0], dtype=torch.float64 if q.dtype == torch.float64 else torch.float32
    )
    options = options_of(
        bias,
        None,
        None,
        alibi_slopes,
        sinks,
        seed,
        causal,
        window_left,
        window_right,
        softcap,
        scale,
        dropout_p,
    )
    if dropout_p:
        for group in _groups(cu_seqlens_q, cu_seqlens_k, options):
            part, part_lse = forward(
                _batch(q, group.rows),
                _batch(k, group.columns),
                _batch(v, group.columns),
                options._replace(
                    bias=_group_bias(options.bias, group),
                    batches=group.numbers,
                    key_lengths=group.key_lengths,
                ),
            )
            _put(out, group.rows, group.real, part)
            _put(lse.T, group.rows, group.real, part_lse)
        return out, lse
    for n, (rows, columns) in enumerate(_sequences(cu_seqlens_q, cu_seqlens_k)):
        own = options
        if options.bias is not None:
            own = options._replace(bias=bias_of_sequence(options.bias, n, rows, columns))
        part, part_lse = forward(_one(q, rows), _one(k, columns), _one(v, columns), own)
        out[rows] = part[0].transpose(0, 1)
        lse[:, rows] = part_lse[0]
    return out, lse


def varlen_attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
    causal: str,
    window_left: int,
    window_right: int,
    softcap: float,
    scale: float,
    dropout_p: float,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return the gradients of q, k and v, and of the bias and the sinks where there are any."""
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    dsinks = None if sinks is None else torch.zeros_like(sinks)
    dbias = None
    options = options_of(
        bias,
        None,
        None,
        alibi_slopes,
        sinks,
        seed,
        causal,
        window_left,
        window_right,
        softcap,
        scale,
        dropout_p,
    )
    if bias_grad and options.bias is not None:
        # The gradient of each sequence comes in the bias's dtype, but is one of many that add up.
        wide = widened(options.bias)
        options, dbias = options._replace(bias=wide), torch.zeros_like(wide)
    if dropout_p:
        for group in _groups(cu_seqlens_q, cu_seqlens_k, options):
            parts = backward(
                _batch(dout, group.rows, group.real),
                None if dlse is None else _batch(dlse.T, group.rows, group.real),
                _batch(q, group.rows),
                _batch(k, group.columns),
                _batch(v, group.columns),
                _batch(out, group.rows),
                _batch(lse.T, group.rows),
                options._replace(
                    bias=_group_bias(options.bias, group),
                    batches=group.numbers,
                    key_lengths=group.key_lengths,
                ),
                bias_grad,
            )
            if dbias is not None and parts[3] is not None:
                _add_bias_gradient(dbias, parts[3], group.numbers)
            _put(dq, group.rows, group.real, parts[0])
            _put(dk, group.columns, group.real_columns, parts[1])
            _put(dv, group.columns, group.real_columns, parts[2])
            if dsinks is not None and parts[4] is not None:
                dsinks += parts[4]
        return dq, dk, dv, shaped_like(dbias, bias), dsinks
    for n, (rows, columns) in enumerate(_sequences(cu_seqlens_q, cu_seqlens_k)):
        own = options
        if options.bias is not None:
            own = options._replace(bias=bias_of_sequence(options.bias, n, rows, columns))
        parts = backward(
            _one(dout, rows),
            None if dlse is None else dlse[None, :, rows],
            _one(q, rows),
            _one(k, columns),
            _one(v, columns),
            _one(out, rows),
            lse[None, :, rows],
            own,
            bias_grad,
        )
        if dbias is not None and parts[3] is not None:
            _add_bias_gradient(dbias, parts[3], [n])
        for whole, part, where in (
            (dq, parts[0], rows),
            (dk, parts[1], columns),
            (dv, parts[2], columns),
        ):
            whole[where] = part[0].transpose(0, 1)
        if dsinks is not None and parts[4] is not None:
            dsinks += parts[4]
    return dq, dk, dv, shaped_like(dbias, bias), dsinks
