"""Calls of the ops with values and layouts at the limits of what may be given, for every backend.

The rule: what is finite gives what the reference gives in float64, within the error of plain
PyTorch in the same precision; how a tensor lies in memory changes no bit; what a length, an offset
or a padding mask hides is never seen.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fuseformer as ff
from fuseformer.testing import assert_close_to_reference

HUGE = 3e38
LEAST = torch.finfo(torch.float32).min
SQ, SK, DIM = 17, 20, 32


def gradients(call: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """Return the result of a call, and the gradients of `inputs` for a fixed incoming one."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = call(*leaves)
    dout = torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def check(
    call: Callable[..., Tensor],
    inputs: list[Tensor],
    backend: str,
    plain: Callable[..., Tensor] | None = None,
) -> None:
    """Judge a call and its gradients against the reference in float64 by the error rule.

    `plain` is what PyTorch offers for it, the reference in the inputs' own precision by default.
    """
    got = gradients(lambda *x: call(*x, backend), inputs)
    low = gradients(plain or (lambda *x: call(*x, "reference")), inputs)
    exact = gradients(lambda *x: call(*x, "reference"), [x.double() for x in inputs])
    for place, (a, b, e) in enumerate(zip(got, low, exact, strict=True)):
        factor, name = (3.0, f"gradient {place}") if place else (2.0, "result")
        assert_close_to_reference(a, e, b, factor=factor, name=name)


def heads(*shape: int, dtype: torch.dtype = torch.float32, factor: float = 1.0) -> Tensor:
    return (torch.randn(*shape) * factor).to(dtype)


# ------------------------------------------------------------------------------------------------
# Magnitudes
# ------------------------------------------------------------------------------------------------


def _bias(rows: dict[int, float], few: float = 0.0, step: int = 3) -> Tensor:
    """Return a bias with some rows filled, and `few` at each `step`-th key of the others."""
    bias = torch.randn(2, SQ, SK)
    bias[..., ::step] += few
    for row, value in rows.items():
        bias[:, row] = value
    return bias


#: Options of `attention` beside a bias, a softcap, slopes, sinks and a window, which all have: so
#: that on Triton one kernel serves them. Of a huge bias a row has but one: where several share the
#: weight an lse in float32 does not tell how many they are, see `attention`.
MAGNITUDES: dict[str, dict[str, Any]] = {
    "a bias of finfo.min": {"bias": lambda: _bias({}, LEAST)},
    "a huge bias": {"bias": lambda: _bias({}, HUGE, 14)},
    "a softcap of 1e6": {"softcap": 1e6},
    "a softcap of 1e38": {"softcap": 1e38},
    "a softcap of 1e300": {"softcap": 1e300},
    "a softcap of 1e-3": {"softcap": 1e-3},
    "huge slopes": {"alibi_slopes": lambda: torch.tensor([1e36, 3e38])},
    "huge negative slopes": {"alibi_slopes": lambda: torch.tensor([-1e30, -3e38])},
    "huge sinks": {"sinks": lambda: torch.tensor([HUGE, -HUGE])},
    "a large scale": {"scale": 1e25},
    "a scale of 0": {"scale": 0.0},
    "a tiny scale": {"scale": 1e-300},
    "a negative scale": {"scale": -0.3},
    "a window past 64 bits": {"window": (2**70, 2**70)},
    "a window past 32 bits": {"window": (2**33 + 3, 2**33)},
}


def magnitude(name: str, dtype: torch.dtype, backend: str) -> None:
    """Check attention with one of the `MAGNITUDES`."""
    torch.manual_seed(0)
    given = {
        "bias": lambda: torch.randn(2, SQ, SK),
        "softcap": 30.0,
        "alibi_slopes": lambda: torch.tensor([0.3, 0.01]),
        "sinks": lambda: torch.randn(2),
        "scale": 0.2,
        "window": (12, 9),
    } | MAGNITUDES[name]
    given = {key: value() if callable(value) else value for key, value in given.items()}
    q, k, v = (heads(1, 2, n, DIM, dtype=dtype) for n in (SQ, SK, SK))
    bias, sinks = given.pop("bias"), given.pop("sinks")

    def call(q, k, v, bias, sinks, backend):
        return ff.attention(q, k, v, bias=bias, sinks=sinks, backend=backend, **given)

    check(call, [q, k, v, bias, sinks], backend)


def whole_rows(value: float, dtype: torch.dtype, backend: str) -> None:
    """Rows of a bias that is one huge number everywhere give the mean of the values."""
    torch.manual_seed(0)
    q, k, v = (heads(1, 2, n, DIM, dtype=dtype) for n in (SQ, SK, SK))
    bias = _bias({0: value, 5: value, 16: value})
    out, lse = ff.attention(q, k, v, bias=bias, return_lse=True, backend=backend)
    exact, exact_lse = ff.attention(
        *(x.double() for x in (q, k, v)), bias=bias.double(), return_lse=True, backend="reference"
    )
    low = ff.attention(q, k, v, bias=bias, backend="reference")
    assert_close_to_reference(out, exact, low)
    assert torch.allclose(lse.double(), exact_lse, rtol=1e-6, atol=1e-4)
    mean = v.float().mean(2)[:, :, None].expand(1, 2, 3, DIM)
    assert torch.allclose(out[:, :, [0, 5, 16]].float(), mean, atol=2e-2)


def large_products(op: str, dtype: torch.dtype, backend: str) -> None:
    """Products of queries and keys past what half precision holds before they are scaled.

    Weights are 0 or 1 then, and gradients of logits next to 0. An lse in float32 makes them as
    wrong as it is, and the rounding of an output too: PyTorch's flash attention is the measure.
    """
    torch.manual_seed(0)
    q, k = (heads(1, 2, n, 64, dtype=dtype, factor=60.0) for n in (SQ, SK))
    v = heads(1, 2, SK, 64, dtype=dtype)
    assert (q.float() @ k.float().mT).abs().max() > torch.finfo(torch.float16).max

    def attention(q, k, v, backend):
        return ff.attention(q, k, v, window=(30, 30), backend=backend)  # that hides nothing

    def varlen(q, k, v, backend):
        ends = torch.tensor([0, SQ], dtype=torch.int32), torch.tensor([0, SK], dtype=torch.int32)
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
        return ff.varlen_attention(q, k, v, *ends, SQ, SK, causal="bottom_right", backend=backend)

    def weights(q, k, v, backend):
        _, lse = ff.attention(q, k, v, return_lse=True, backend=backend)
        return ff.attention_weights(q, k, lse.detach()).to(v.dtype) @ v

    calls = {"attention": attention, "varlen_attention": varlen, "attention_weights": weights}
    if op == "decode_attention":
        lengths = torch.tensor([SK], dtype=torch.int32)
        given = (q[:, :, :5], k, v)
        results = [
            ff.decode_attention(*x, lengths, backend=name)
            for x, name in (
                (given, backend),
                ([t.double() for t in given], "reference"),
                (given, "reference"),
            )
        ]
        assert_close_to_reference(*results)
        return
    plain = None
    if op == "attention":
        plain = F.scaled_dot_product_attention
    elif op == "varlen_attention":
        seen = torch.ones(SQ, SK, dtype=torch.bool).tril(SK - SQ)

        def plain(q, k, v):
            return F.scaled_dot_product_attention(q, k, v, seen)[0].transpose(0, 1)

    check(calls[op], [q, k, v], backend, plain)


def lengths_past_32_bits(backend: str, dtype: torch.dtype) -> None:
    """Lengths of 64 bits mean what they say: all keys, or none where they are negative."""
    torch.manual_seed(0)
    q, k, v = (heads(5, 2, n, DIM, dtype=dtype) for n in (3, SK, SK))
    lengths = torch.tensor([2**31, 2**32 + 1, 2**62, -3, 4])
    bounded = lengths.clamp(0, SK).to(torch.int32)
    for op in (
        lambda n: ff.attention(q, k, v, key_lengths=n, backend=backend),
        lambda n: ff.decode_attention(q, k, v, n, backend=backend),
    ):
        assert torch.equal(op(lengths), op(bounded))
