"""What the feed-forward and cross entropy kernels must satisfy; each check raises
`AssertionError` where one does not.

`kernels` is the kernel module, or a copy of it with a planted bug.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from unittest import mock

import torch
from torch import Tensor

import fuseformer as ff
from fuseformer import reference
from fuseformer.philox import keep_mask
from fuseformer.testing import assert_close_to_reference

SEED = -7_000_000_000_123

Results = dict[str, Tensor]


def judge(
    run: Callable[[], Results], oracle: Callable[[torch.dtype], Results], dtype: torch.dtype
) -> None:
    """Hold the results of `run` to the oracle's, gradients being named d..., and a second run.

    The second run must give the same bits: the kernels are deterministic.
    """
    actual, again = run(), run()
    exact, low = oracle(torch.float64), oracle(dtype)
    assert actual.keys() == exact.keys()
    for name, result in actual.items():
        factor = 3.0 if name.startswith("d") else 2.0
        assert_close_to_reference(result, exact[name], low[name], factor=factor, name=name)
        same = torch.equal(result.nan_to_num(), again[name].nan_to_num())
        assert same, f"{name} differs when repeated"


def differentiate(loss: Tensor, leaves: dict[str, Tensor]) -> Results:
    """Return the gradient of `loss` for each leaf, under its name after a d."""
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return {f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}


def without_absent(**tensors: Tensor | None) -> Results:
    """Return the tensors that are not None."""
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


# ------------------------------------------------------------------------------------------------
# Feed-forward
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FeedForwardCase:
    """A call: (tokens, width, hidden, out), and which kernels serve it.

    `chunked` makes backward take the tokens one block at a time, as many tokens would.
    """

    sizes: tuple[int, int, int, int]
    activation: str
    dtype: torch.dtype
    dropout_p: float = 0.0
    biases: bool = True
    resident: bool = False
    chunked: bool = False

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        regime = f"{'resident' if self.resident else 'epilogue'}{'-chunked' * self.chunked}"
        sizes = "x".join(map(str, self.sizes))
        bias = "-biases" * self.biases
        return f"{regime}-{dtype}-{sizes}-{self.activation}{bias}-{self.dropout_p}"


@contextmanager
def regime(kernels: ModuleType, resident: bool, chunked: bool = False) -> Iterator[None]:
    """Let few tokens, which do not fill a GPU, reach the resident kernels, or none at all."""
    if not hasattr(kernels, "resident_forward"):
        assert not resident, "the kernels have no resident regime"
        yield
        return
    limits = {"_MIN_PROGRAMS": 0 if resident else 10**9}
    if chunked:
        limits["_CHUNK_BYTES"] = 1
    module = sys.modules[kernels.resident_forward.__module__]
    reached = mock.patch.object(kernels, "resident_forward", wraps=kernels.resident_forward)
    with mock.patch.multiple(module, **limits), reached as forward:
        yield
    assert forward.called == resident, "the case has not reached the kernels that it names"


def check_feed_forward(kernels: ModuleType, case: FeedForwardCase) -> None:
    """Forward and backward against the oracle, and repeated."""
    generator = torch.Generator().manual_seed(0)
    tokens, width, hidden, out = case.sizes

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    tensors = {
        "x": draw(width, tokens).T,  # not contiguous
        "w1": draw(hidden, width) / width**0.5,
        "w2": draw(out, hidden) / hidden**0.5,
    }
    if case.biases:
        tensors |= {"b1": draw(hidden), "b2": draw(out)}
    tensors = {name: tensor.to(case.dtype) for name, tensor in tensors.items()}
    dy = draw(tokens, out).to(case.dtype)
    seed = torch.tensor(SEED) if case.dropout_p else None
    options = (seed, case.activation, case.dropout_p)

    def run() -> Results:
        x, w1, w2 = (tensors[name] for name in ("x", "w1", "w2"))
        b1, b2 = tensors.get("b1"), tensors.get("b2")
        y, pre = kernels.feed_forward_forward(x, w1, b1, w2, b2, *options)
        dx, dw1, db1, dw2, db2 = kernels.feed_forward_backward(
            dy, x, w1, b1, w2, pre, *options, case.biases
        )
        return {"y": y, **without_absent(dx=dx, dw1=dw1, dw2=dw2, db1=db1, db2=db2)}

    def oracle(dtype: torch.dtype) -> Results:
        leaves = {name: t.to(dtype).requires_grad_() for name, t in tensors.items()}
        y = reference.feed_forward(
            leaves["x"],
            leaves["w1"],
            leaves.get("b1"),
            leaves["w2"],
            leaves.get("b2"),
            activation=case.activation,
            dropout_p=case.dropout_p,
            seed=seed,
        )
        return {"y": y, **differentiate((y * dy.to(dtype)).sum(), leaves)}

    with regime(kernels, case.resident, case.chunked):
        judge(run, oracle, case.dtype)


def check_feed_forward_dropout(kernels: ModuleType, size: int, dropout_p: float) -> None:
    """The keep decision of every hidden activation, both ways, is that of the definition.

    With identities for weights and input and a bias of 1, every pre-activation is 1 or 2 and each
    element of y, dx, dw1 and dw2 holds one hidden element: nonzero where kept.
    """
    seed = torch.tensor(2**40 + 17)
    keep = keep_mask(seed, dropout_p, range(1), range(1), range(size), size)[0, 0]
    eye, ones = torch.eye(size, dtype=torch.float16), torch.ones(size, dtype=torch.float16)
    options = (seed, "silu", dropout_p)
    y, pre = kernels.feed_forward_forward(eye, eye, ones, eye, None, *options)
    assert torch.equal(y != 0, keep), "forward pass"
    dy = torch.ones_like(eye)
    dx, dw1, db1, _, _ = kernels.feed_forward_backward(
        dy, eye, eye, ones, eye, pre, *options, False
    )
    assert torch.equal(dx != 0, keep), "dx"
    assert torch.equal(dw1.T != 0, keep), "dw1"
    assert torch.equal(db1 != 0, keep.any(0)), "db1"
    _, _, _, dw2, _ = kernels.feed_forward_backward(eye, eye, eye, ones, eye, pre, *options, False)
    assert torch.equal(dw2 != 0, keep), "dw2"


def check_no_columns(backend: str, dtype: torch.dtype) -> None:
    """Tokens of no numbers at all: each has the output of the biases, and no gradient of its own.

    Few and more tokens, and none; the shape before the last dimension cannot be found by division.
    """
    generator = torch.Generator().manual_seed(0)
    b1, w2, b2 = (
        torch.randn(*shape, generator=generator).to(dtype).requires_grad_()
        for shape in ((24,), (16, 24), (16,))
    )
    for lead in ((), (3,), (2, 3), (40,), (0, 2)):
        x, w1 = (torch.zeros(*s, 0, dtype=dtype).requires_grad_() for s in (lead, (24,)))
        results = []
        for name, inputs in (
            (backend, [x, w1, b1, w2, b2]),
            ("reference", [x, w1, b1, w2, b2]),
            ("reference", [t.detach().double().requires_grad_() for t in (x, w1, b1, w2, b2)]),
        ):
            y = ff.feed_forward(*inputs, activation="gelu", backend=name)
            assert y.shape == (*lead, 16)
            results.append((y, *torch.autograd.grad(y.sum(), inputs)))
        bias = torch.nn.functional.gelu(inputs[2])
        expected = torch.nn.functional.linear(bias, *inputs[3:]).expand(*lead, 16)
        torch.testing.assert_close(results[2][0], expected)
        for place, (got, low, exact) in enumerate(zip(*results, strict=True)):
            assert got.shape == exact.shape
            assert_close_to_reference(got, exact, low, factor=3.0 if place else 2.0)
        y = ff.gated_feed_forward(x, w1, w1, w2, backend=backend)
        assert y.shape == (*lead, 16)
        assert not y.any()
        gradients = torch.autograd.grad(y.sum(), (x, w1, w2))
        assert not any(g.any() for g in gradients)


# ------------------------------------------------------------------------------------------------
# Cross entropy
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CrossEntropyCase:
    """A call: (tokens, width, vocab), the loss, and what is special about it.

    `ignored` is the share of rows without a target. `forbidden` classes, the first ones, have a
    bias of -inf. `fused` gradients are formed beside the loss, others by the backward pass.
    `chunked` makes every row a chunk of its own; `captured` hands ignored rows to the kernel, as a
    captured graph must.
    """

    sizes: tuple[int, int, int]
    dtype: torch.dtype
    reduction: str = "mean"
    label_smoothing: float = 0.0
    softcap: float = 0.0
    bias: bool = False
    ignored: float = 0.3
    forbidden: int = 0
    z_loss: float = 0.0
    fused: bool = True
    chunked: bool = False
    captured: bool = False

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        words = ["bias", "forbidden", "fused", "chunked", "captured"]
        special = "".join(f"-{word}" for word in words if getattr(self, word))
        numbers = f"{self.label_smoothing}-{self.softcap}-{self.ignored}"
        special += f"-z{self.z_loss:g}" * bool(self.z_loss)
        return f"{dtype}-{'x'.join(map(str, self.sizes))}-{self.reduction}-{numbers}{special}"


def check_cross_entropy(kernels: ModuleType, case: CrossEntropyCase) -> None:
    """Loss, lse and gradients against the oracle, and repeated; ignored rows exactly 0.

    Losses are judged row by row and their reduction by equality: the error of one number says
    little about that of another.
    """
    generator = torch.Generator().manual_seed(0)
    tokens, width, vocab = case.sizes

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    tensors = {"hidden": draw(width, tokens).T, "weight": draw(vocab, width) / width**0.5}
    if case.bias or case.forbidden:
        tensors["bias"] = draw(vocab)
        tensors["bias"][: case.forbidden] = -torch.inf
    tensors = {name: t.to(case.dtype) for name, t in tensors.items()}
    target = torch.randint(case.forbidden, vocab, (tokens,), generator=generator)
    ignored = torch.rand(tokens, generator=generator) < case.ignored
    target[ignored] = -100
    dloss = draw(tokens) if case.reduction == "none" else draw(1)[0]
    options = (-100, case.label_smoothing, case.softcap, case.z_loss, case.reduction)

    def run() -> Results:
        hidden, weight = tensors["hidden"], tensors["weight"]
        bias = tensors.get("bias")
        loss, lse, *gradients = kernels.linear_cross_entropy_forward(
            hidden, weight, bias, target, *options, case.fused
        )
        if case.fused:
            gradients = [None if g is None else g * dloss.to(g.dtype) for g in gradients]
        else:
            assert gradients == [None, None, None]
            gradients = kernels.linear_cross_entropy_backward(
                dloss, hidden, weight, bias, target, lse, *options
            )
        dhidden, dweight, dbias = gradients
        row_losses, *_ = kernels.linear_cross_entropy_forward(
            hidden, weight, bias, target, *options[:4], "none", False
        )
        expected = row_losses if case.reduction == "none" else row_losses.sum()
        if case.reduction == "mean":
            expected = expected / (~ignored).sum()
        assert torch.equal(loss.nan_to_num(), expected.nan_to_num()), "the reduction of the loss"
        assert not lse[ignored].any(), "lse of ignored rows must be 0"
        assert not dhidden[ignored].any(), "ignored rows must have gradient 0"
        named = {"dhidden": dhidden, "dweight": dweight, "dbias": dbias}
        return {"loss": row_losses, "lse": lse, **without_absent(**named)}

    def oracle(dtype: torch.dtype) -> Results:
        leaves = {name: t.to(dtype).requires_grad_() for name, t in tensors.items()}
        losses = [
            reference.linear_cross_entropy(
                leaves["hidden"],
                leaves["weight"],
                target,
                leaves.get("bias"),
                ignore_index=-100,
                label_smoothing=case.label_smoothing,
                softcap=case.softcap,
                z_loss=case.z_loss,
                reduction=reduction,
            )
            for reduction in ("none", case.reduction)
        ]
        loss = losses[1]
        with torch.no_grad():
            logits = torch.nn.functional.linear(*leaves.values()).to(loss.dtype)
            if case.softcap:
                logits = case.softcap * torch.tanh(logits / case.softcap)
            lse = logits.logsumexp(1).masked_fill(ignored, 0.0)
        return {
            "loss": losses[0],
            "lse": lse,
            **differentiate((loss * dloss.to(loss.dtype)).sum(), leaves),
        }

    limit = 1 if case.chunked else kernels._LOGITS_BYTES
    capturing = mock.patch.object(kernels, "_capturing", return_value=case.captured)
    with mock.patch.object(kernels, "_LOGITS_BYTES", limit), capturing:
        judge(run, oracle, case.dtype)
