"""What an attention kernel module must satisfy; each check raises `AssertionError` where it fails.

`kernels` is `fuseformer.kernels.attention`, or a copy of it with a planted bug.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fuseformer import reference
from fuseformer.philox import dropout_scale, keep_mask
from fuseformer.testing import assert_close_to_reference

NO_OPTIONS = (-1, -1, 0.0)  # window left and right, softcap
RESULTS = ("out", "lse", "dq", "dk", "dv", "dbias", "dsinks")


@dataclass(frozen=True)
class Case:
    """A dense call: sizes, dtype, and what hides keys."""

    heads: tuple[int, int]
    lengths: tuple[int, int]
    head_dim: int
    dtype: torch.dtype
    causal: str = "none"
    dropout_p: float = 0.0
    key_lengths: tuple[int, ...] = ()
    padding: bool = False
    scale: float | None = None
    batch: int = 1
    bias: str = ""  # its dimensions that are not broadcast, of "bhqk"
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    alibi: bool = False
    sinks: bool = False

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        sizes = f"{self.batch}x{self.heads[0]}:{self.heads[1]}x{self.lengths[0]}:{self.lengths[1]}"
        masks = f"{self.causal}{'-lengths' * bool(self.key_lengths)}{'-padding' * self.padding}"
        options = [
            f"bias_{self.bias}" * bool(self.bias),
            f"window_{self.window[0]}:{self.window[1]}" * (self.window != (-1, -1)),
            f"softcap_{self.softcap}" * bool(self.softcap),
            "alibi" * self.alibi,
            "sinks" * self.sinks,
        ]
        name = f"{dtype}-{sizes}x{self.head_dim}-{masks}-{self.dropout_p}"
        return "-".join([name, *filter(None, options)])


def gradients(
    out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None, inputs: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Return the gradients of `inputs` for those of the output and the lse, by autograd."""
    loss = (out * dout.to(out.dtype)).sum()
    if dlse is not None:
        loss = loss + (torch.where(lse.isfinite(), lse, 0.0) * dlse.to(lse.dtype)).sum()
    return torch.autograd.grad(loss, inputs)


def expectations(oracle, inputs: Sequence[Any], dout, dlse) -> tuple[list[str], list[Any]]:
    """Return the names of the results, and (out, lse, *gradients) in float64 and in their dtype.

    `inputs` holds None where there is no such input, and then there is no such gradient.
    """
    expected = []
    given = [x for x in inputs if x is not None]
    for dtype in (torch.float64, given[0].dtype):
        leaves = [x.detach().to(dtype).requires_grad_() for x in given]
        left = iter(leaves)
        out, lse = oracle(*(None if x is None else next(left) for x in inputs))
        expected.append((out.detach(), lse.detach(), *gradients(out, lse, dout, dlse, leaves)))
    names = [n for n, x in zip(RESULTS, (..., ..., *inputs), strict=False) if x is not None]
    return names, list(zip(*expected, strict=True))


def judge(names: Sequence[str], actual: Sequence[Tensor], expected: Sequence[Any]) -> None:
    """Hold results against what `expectations` found for them."""
    for name, result, (exact, low) in zip(names, actual, expected, strict=True):
        factor = 2.0 if name in ("out", "lse") else 3.0
        assert_close_to_reference(result, exact, low, factor=factor, name=name)


def compare(actual: Sequence[Tensor | None], oracle, inputs: Sequence[Any], dout, dlse) -> None:
    """Judge (out, lse, *gradients); `actual` holds None where there is no such gradient."""
    names, expected = expectations(oracle, inputs, dout, dlse)
    judge(names, [x for x in actual if x is not None], expected)


def check_dense(kernels: ModuleType, case: Case) -> None:
    """Forward and backward, dlse included, against the oracle; hidden parts exactly 0."""
    generator = torch.Generator().manual_seed(0)
    (heads, kv_heads), (sq, sk), d = case.heads, case.lengths, case.head_dim

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(case.dtype)

    q = draw(case.batch, sq, heads, d).transpose(1, 2)
    k = draw(case.batch, sk, kv_heads, d).transpose(1, 2)
    v, dout = draw(case.batch, kv_heads, sk, d), draw(case.batch, heads, sq, d)
    dlse = torch.randn(case.batch, heads, sq, generator=generator)
    padding = lengths = seed = None
    if case.padding:
        padding = torch.rand(case.batch, sk, generator=generator) < 0.4
        padding[-1] = True
    if case.key_lengths:
        lengths = torch.tensor(case.key_lengths, dtype=torch.int32)
    if case.dropout_p:
        seed = torch.tensor(-7_000_000_000_123)
    scale = d**-0.5 if case.scale is None else case.scale
    bias = slopes = sinks = None
    if case.bias:
        sizes = {"b": case.batch, "h": heads, "q": sq, "k": sk}.items()
        bias = draw(*(n if name in case.bias else 1 for name, n in sizes))
    if case.alibi:
        slopes = 2.0 ** -torch.arange(1.0, heads + 1)
    if case.sinks:
        sinks = draw(heads)
    masks = (bias, padding, lengths, slopes, sinks)
    options = (seed, case.causal, *case.window, case.softcap, scale, case.dropout_p)

    def oracle(q, k, v, bias, sinks) -> tuple[Tensor, Tensor]:
        return reference.attention(
            q,
            k,
            v,
            causal=case.causal,
            key_padding_mask=padding,
            key_lengths=lengths,
            bias=bias,
            window=case.window,
            softcap=case.softcap,
            alibi_slopes=slopes,
            sinks=sinks,
            scale=scale,
            dropout_p=case.dropout_p,
            seed=seed,
        )

    names, expected = expectations(oracle, (q, k, v, bias, sinks), dout, dlse)
    out, lse = kernels.attention_forward(q, k, v, *masks, *options)
    assert out.stride() == q.stride()
    # Judged before backward runs: a bug in it shows without the other kernels.
    judge(names[:2], (out, lse), expected[:2])
    grads = kernels.attention_backward(
        dout, dlse, q, k, v, out, lse, *masks, *options, bias is not None
    )
    judge(names[2:], [x for x in grads if x is not None], expected[2:])
    dq, dk, dv, *_ = grads
    _, plain_lse = reference.attention(
        *(x.float() for x in (q, k, v)),
        causal=case.causal,
        key_padding_mask=padding,
        key_lengths=lengths,
        window=case.window,
    )
    empty = plain_lse == -torch.inf
    assert not out[empty].any(), "rows without keys must give 0"
    assert not dq[empty].any(), "rows without keys must have gradient 0"
    hidden = torch.zeros(case.batch, sk, dtype=torch.bool) if padding is None else padding
    if lengths is not None:
        hidden = hidden | (torch.arange(sk) >= lengths[:, None])
    for name, grad in (("dk", dk), ("dv", dv)):
        assert not grad.transpose(1, 2)[hidden].any(), f"{name} of padded keys must be 0"


def check_packed(
    kernels: ModuleType,
    sequences: tuple[tuple[int, int], ...],
    head_dim: int,
    dtype: torch.dtype,
    causal: str,
    dropout_p: float,
    unowned: int = 0,
    *,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    bias: str = "",
    alibi: bool = False,
    sinks: bool = False,
) -> None:
    """Packed sequences of (queries, keys) against the oracle; `unowned` rows at the end stay 0."""
    generator = torch.Generator().manual_seed(1)
    counts = torch.tensor([(0, 0), *sequences])
    queries, keys = counts.cumsum(0).to(torch.int32).unbind(1)
    queries, keys = queries.contiguous(), keys.contiguous()
    total_q, total_k = int(queries[-1]) + unowned, int(keys[-1]) + unowned

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    q, dout = draw(total_q, 6, head_dim), draw(total_q, 6, head_dim)
    k, v = draw(total_k, 2, head_dim), draw(total_k, 2, head_dim)
    dlse = torch.randn(6, total_q, generator=generator)
    seed = torch.tensor(99) if dropout_p else None
    longest = (max(n for n, _ in sequences), max(n for _, n in sequences))
    slopes = 2.0 ** -torch.arange(1.0, 7) if alibi else None
    sink = draw(6) if sinks else None
    table = None
    if bias:
        sizes = {"b": len(sequences), "h": 6, "q": longest[0], "k": longest[1]}.items()
        table = draw(*(n if name in bias else 1 for name, n in sizes))
    packing = (queries, keys, *longest, table, slopes, sink)
    options = (seed, causal, *window, softcap, head_dim**-0.5, dropout_p)
    out, lse = kernels.varlen_attention_forward(q, k, v, *packing, *options)
    dq, dk, dv, dbias, dsinks = kernels.varlen_attention_backward(
        dout, dlse, q, k, v, out, lse, *packing, *options, table is not None
    )
    if unowned:
        for name, rows in (("out", out), ("dq", dq), ("dk", dk), ("dv", dv)):
            assert not rows[-unowned:].any(), f"{name} of rows that no sequence owns must be 0"
        assert (lse[:, -unowned:] == -torch.inf).all()
    real_q, real_k = total_q - unowned, total_k - unowned
    q, dout, out, dq = (x[:real_q] for x in (q, dout, out, dq))
    k, v, dk, dv = (x[:real_k] for x in (k, v, dk, dv))

    def oracle(q, k, v, bias, sinks) -> tuple[Tensor, Tensor]:
        return reference.varlen_attention(
            q,
            k,
            v,
            queries,
            keys,
            causal=causal,
            bias=bias,
            window=window,
            softcap=softcap,
            alibi_slopes=slopes,
            sinks=sinks,
            dropout_p=dropout_p,
            seed=seed,
        )

    results = (out, lse[:, :real_q], dq, dk, dv, dbias, dsinks)
    compare(results, oracle, (q, k, v, table, sink), dout, dlse[:, :real_q])


def check_dropout_mask(kernels: ModuleType, dropout_p: float) -> None:
    """The keep decision of every element, in all passes, is that of the definition.

    With identity matrices for inputs, each output element holds one weight: nonzero where kept.
    """
    batch, heads, size = 2, 3, 128
    seed = torch.tensor(2**40 + 17)
    keep = keep_mask(seed, dropout_p, range(batch), range(heads), range(size), size)
    eye = torch.eye(size, dtype=torch.float16).expand(batch, heads, size, size)
    ones = torch.ones_like(eye)
    masks = (None, None, None, None, None)
    options = (seed, "none", *NO_OPTIONS, 0.25, dropout_p)
    out, lse = kernels.attention_forward(eye, eye, eye, *masks, *options)
    assert torch.equal(out > 0, keep), "forward pass"
    weight = 1 / (size - 1 + torch.tensor(0.25).exp())
    largest = out[..., 0, 1:].max().item()
    assert abs(largest / (weight * dropout_scale(dropout_p)) - 1) < 2**-10, "factor of kept weights"
    # dv[j, i] holds the weight of (i, j) where dout is the identity.
    _, _, dv, _, _ = kernels.attention_backward(
        eye, None, eye, eye, eye, out, lse, *masks, *options, False
    )
    assert torch.equal(dv.transpose(-2, -1) > 0, keep), "dv"
    # With an output of 0, delta is 0, and v of 1/size makes every dP 1 where kept.
    dq, dk, _, _, _ = kernels.attention_backward(
        ones, None, eye, eye, ones / size, torch.zeros_like(ones), lse, *masks, *options, False
    )
    assert torch.equal(dq > 0, keep), "dq"
    assert torch.equal(dk.transpose(-2, -1) > 0, keep), "dk"
