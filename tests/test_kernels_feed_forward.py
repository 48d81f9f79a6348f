"""The feed-forward kernels executed on the CPU, both regimes, against the oracle."""

import pytest
import torch
from fuseformer.kernels import feed_forward_resident
from fuseformer.kernels.feed_forward import saves_pre

import fuseformer as ff
from fuseformer.testing import assert_close_to_reference

pytest.importorskip("ttsem")
pytestmark = pytest.mark.usefixtures("triton_on_cpu")

CASES = [  # tokens, width, hidden, activation, biases, dropout, dtype
    (1, 40, 72, "relu", True, 0.0, torch.bfloat16),
    (63, 96, 100, "silu", False, 0.0, torch.float16),
    (111, 72, 130, "gelu_tanh", True, 0.3, torch.float32),
    (65, 320, 96, "relu", True, 0.3, torch.bfloat16),
    (33, 320, 96, "gelu", False, 0.0, torch.float16),
    (63, 128, 96, "relu", False, 0.3, torch.float16),
]


def gradients(tensors, biases, activation, p, backend, dtype):
    """Return the output and all gradients of one call."""
    torch.manual_seed(1)
    leaves = [t.to(dtype, copy=True).requires_grad_() for t in tensors]
    x, w1, w2, *b = leaves
    b1, b2 = b if biases else (None, None)
    y = ff.feed_forward(
        x, w1, b1, w2, b2, activation=activation, dropout_p=p, seed=9, backend=backend
    )
    weight = torch.randn(y.shape, dtype=torch.float64)
    return [y, *torch.autograd.grad((y * weight).sum(), leaves)]


@pytest.mark.parametrize(
    ("case", "resident"),
    [(c, r) for c in CASES for r in (False, True) if not (r and saves_pre(c[1], c[1], c[-1]))],
    ids=str,
)
def test_against_the_oracle_and_repeatable(case, resident, monkeypatch):
    # A few tokens do not fill a GPU, and are kept from the resident kernels for that reason alone.
    monkeypatch.setattr(feed_forward_resident, "_MIN_PROGRAMS", 0 if resident else 10**9)
    tokens, width, hidden, activation, biases, p, dtype = case
    torch.manual_seed(0)
    tensors = [
        torch.randn(width, tokens).T,  # not contiguous
        torch.randn(hidden, width) / width**0.5,
        torch.randn(width, hidden) / hidden**0.5,
        *([torch.randn(hidden), torch.randn(width)] if biases else []),
    ]
    tensors = [t.to(dtype) for t in tensors]
    actual = gradients(tensors, biases, activation, p, "triton", dtype)
    exact = gradients(tensors, biases, activation, p, "reference", torch.float64)
    low = gradients(tensors, biases, activation, p, "reference", dtype)
    for i, (a, e, b) in enumerate(zip(actual, exact, low, strict=True)):
        assert_close_to_reference(a, e, b, factor=3 if i else 2, name=f"result {i}")
    for a, b in zip(
        actual, gradients(tensors, biases, activation, p, "triton", dtype), strict=True
    ):
        assert torch.equal(a, b)


def test_no_tokens():
    x, w1, w2 = torch.zeros(0, 40), torch.randn(72, 40), torch.randn(40, 72)
    for dtype in (torch.float32, torch.bfloat16):
        y, dx, dw1, dw2 = gradients([x, w1, w2], False, "relu", 0.0, "triton", dtype)
        assert y.shape == dx.shape == (0, 40)
        assert (dw1 == 0).all()
        assert (dw2 == 0).all()
