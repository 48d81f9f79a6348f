"""What the gated feed-forward kernels and those for few rows must satisfy; each check raises
`AssertionError` where one does not.

`kernels` is the kernel module, or a copy of it with a planted bug.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from unittest import mock

import torch
from block_checks import SEED, Results, differentiate, judge
from torch import Tensor

from fuseformer import reference
from fuseformer.philox import keep_mask

REGIMES = ("resident", "epilogue", "few rows")


@dataclass(frozen=True)
class GatedCase:
    """A call: (tokens, width, hidden, out), and which kernels serve its forward pass.

    `chunked` makes the resident backward take the tokens one block at a time.
    """

    sizes: tuple[int, int, int, int]
    activation: str
    dtype: torch.dtype
    dropout_p: float = 0.0
    regime: str = "epilogue"
    chunked: bool = False

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        sizes = "x".join(map(str, self.sizes))
        regime = self.regime.replace(" ", "-") + "-chunked" * self.chunked
        return f"{regime}-{dtype}-{sizes}-{self.activation}-{self.dropout_p}"


@contextmanager
def served_by(kernels: ModuleType, regime: str, chunked: bool = False) -> Iterator[None]:
    """Let few tokens reach the kernels of `regime`, and see that they do."""
    assert regime in REGIMES
    if not hasattr(kernels, "resident_forward"):
        assert regime != "resident", "the kernels have no resident regime"
        yield
        return
    limits = {"_MIN_PROGRAMS": 0 if regime == "resident" else 10**9}
    if chunked:
        limits["_CHUNK_BYTES"] = 1
    resident = sys.modules[kernels.resident_forward.__module__]
    few = mock.patch.object(kernels, "few_tokens", return_value=regime == "few rows")
    wrapped = [
        mock.patch.object(kernels, name, wraps=getattr(kernels, name))
        for name in ("resident_forward", "decode_forward")
    ]
    limited = mock.patch.multiple(resident, **limits)
    with limited, few, wrapped[0] as to_resident, wrapped[1] as to_decode:
        yield
    reached = "resident" if to_resident.called else "few rows" if to_decode.called else "epilogue"
    assert reached == regime, "the case has not reached the kernels that it names"


def check_gated(kernels: ModuleType, case: GatedCase) -> None:
    """Forward and backward against the oracle, and repeated."""
    generator = torch.Generator().manual_seed(0)
    tokens, width, hidden, out = case.sizes

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    tensors = {
        "x": draw(width, tokens).T,  # not contiguous
        "w_gate": draw(hidden, width) / width**0.5,
        "w_up": draw(hidden, width) / width**0.5,
        "w_down": draw(out, hidden) / hidden**0.5,
    }
    tensors = {name: tensor.to(case.dtype) for name, tensor in tensors.items()}
    dy = draw(tokens, out).to(case.dtype)
    seed = torch.tensor(SEED) if case.dropout_p else None
    options = (seed, case.activation, case.dropout_p)

    def run() -> Results:
        inputs = tensors.values()
        y, pre, up = kernels.gated_feed_forward_forward(*inputs, *options)
        gradients = kernels.gated_feed_forward_backward(dy, *inputs, pre, up, *options)
        return {"y": y, **{f"d{n}": g for n, g in zip(tensors, gradients, strict=True)}}

    def oracle(dtype: torch.dtype) -> Results:
        leaves = {name: t.to(dtype).requires_grad_() for name, t in tensors.items()}
        y = reference.gated_feed_forward(
            *leaves.values(), activation=case.activation, dropout_p=case.dropout_p, seed=seed
        )
        return {"y": y, **differentiate((y * dy.to(dtype)).sum(), leaves)}

    with served_by(kernels, case.regime, case.chunked):
        judge(run, oracle, case.dtype)


def check_gated_dropout(kernels: ModuleType, size: int, dropout_p: float) -> None:
    """The keep decision of every hidden activation, both ways, is that of the definition.

    With identities for w_down and dy, each element of y, dw_down and, by rows of ones, of dx and
    the other gradients holds one hidden element: nonzero where kept.
    """
    seed = torch.tensor(2**40 + 17)
    keep = keep_mask(seed, dropout_p, range(1), range(1), range(size), size)[0, 0]
    eye = torch.eye(size, dtype=torch.float16)
    ones = torch.ones_like(eye)
    options = (seed, "silu", dropout_p)
    # Every product of first order is 1: x has one column in use.
    x, w = torch.zeros_like(eye), torch.zeros_like(eye)
    x[:, 0], w[:, 0] = 1, 1
    y, pre, up = kernels.gated_feed_forward_forward(x, w, w, eye, *options)
    assert torch.equal(y != 0, keep), "forward pass"
    saved = (pre, up)
    _, _, _, dw_down = kernels.gated_feed_forward_backward(eye, x, w, w, eye, *saved, *options)
    assert torch.equal(dw_down != 0, keep), "dw_down"
    y, pre, up = kernels.gated_feed_forward_forward(eye, ones, ones, eye, *options)
    assert torch.equal(y != 0, keep), "forward pass"
    _, dw_gate, dw_up, _ = kernels.gated_feed_forward_backward(
        ones, eye, ones, ones, eye, pre, up, *options
    )
    assert torch.equal(dw_gate.T != 0, keep), "dw_gate"
    assert torch.equal(dw_up.T != 0, keep), "dw_up"
