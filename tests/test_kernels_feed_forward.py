"""The feed-forward kernels executed on the CPU, both regimes, against the oracle."""

import pytest
import torch
from block_checks import (
    FeedForwardCase,
    check_feed_forward,
    check_feed_forward_dropout,
    check_no_columns,
    regime,
)
from fuseformer.kernels import feed_forward as kernels

import fuseformer.cpu.feed_forward

pytest.importorskip("ttsem")
pytestmark = pytest.mark.usefixtures("triton_on_cpu")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

Case = FeedForwardCase
CASES = [
    # epilogue: every activation in every dtype, with and without dropout and biases
    Case((1, 40, 72, 40), "relu", BF16),
    Case((49, 8, 129, 24), "relu", BF16, 0.3, biases=False),
    Case((63, 40, 100, 40), "relu", FP16, 0.3),
    Case((17, 40, 257, 72), "relu", FP32, biases=False),
    Case((33, 320, 96, 320), "gelu", BF16, 0.5),
    Case((17, 320, 96, 320), "gelu", FP16, biases=False),
    Case((65, 72, 130, 40), "gelu", FP32, 0.2),
    Case((130, 24, 40, 8), "gelu_tanh", BF16),
    Case((16, 40, 128, 40), "gelu_tanh", FP16, 0.1, biases=False),
    Case((33, 72, 130, 72), "gelu_tanh", FP32, 0.3),
    Case((31, 40, 72, 264), "silu", BF16, 0.2),
    Case((63, 96, 100, 96), "silu", FP16, biases=False),
    Case((1, 33, 31, 7), "silu", FP32, 0.4),
    # resident: the same, at every padded width, one chunk of tokens or several
    Case((1, 40, 72, 40), "relu", BF16, resident=True),
    Case((150, 24, 40, 32), "relu", BF16, 0.3, resident=True, chunked=True),
    Case((63, 128, 96, 128), "relu", FP16, 0.3, biases=False, resident=True),
    Case((70, 72, 100, 33), "gelu", BF16, 0.2, resident=True, chunked=True),
    Case((130, 32, 64, 32), "gelu", FP16, resident=True),
    Case((63, 96, 100, 40), "gelu_tanh", BF16, biases=False, resident=True),
    Case((65, 200, 40, 256), "gelu_tanh", FP16, 0.1, resident=True, chunked=True),
    Case((129, 64, 65, 17), "silu", BF16, 0.6, resident=True),
    Case((17, 256, 33, 8), "silu", FP16, biases=False, resident=True, chunked=True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_the_oracle_and_repeatable(case):
    check_feed_forward(kernels, case)


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize(("size", "dropout_p"), [(40, 0.1), (72, 0.75)])
def test_dropout_decides_as_defined_both_ways(size, dropout_p, resident):
    with regime(kernels, resident, chunked=True):
        check_feed_forward_dropout(kernels, size, dropout_p)


def test_dropout_decides_the_same_on_the_cpu_backend():
    check_feed_forward_dropout(fuseformer.cpu.feed_forward, 80, 0.1)


@pytest.mark.parametrize("resident", [True, False])
def test_everything_dropped_leaves_the_bias(resident):
    torch.manual_seed(0)
    x, w1, w2, b2 = (torch.randn(s, dtype=BF16) for s in ((33, 40), (72, 40), (24, 72), (24,)))
    options = (torch.tensor(3), "gelu", 1.0)
    with regime(kernels, resident):
        y, pre = kernels.feed_forward_forward(x, w1, None, w2, b2, *options)
        gradients = kernels.feed_forward_backward(y, x, w1, None, w2, pre, *options, True)
    dx, dw1, db1, dw2, db2 = gradients
    assert torch.equal(y, b2.expand(33, 24))
    assert db1 is None
    assert not any(gradient.any() for gradient in (dx, dw1, dw2))
    assert torch.equal(db2, y.sum(0))


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_no_tokens(dtype):
    shapes = ((0, 40), (72, 40), (72,), (24, 72), (24,))
    x, w1, b1, w2, b2 = (torch.ones(shape, dtype=dtype) for shape in shapes)
    for resident in (False, True)[: 1 + (dtype != FP32)]:
        with regime(kernels, resident):
            y, pre = kernels.feed_forward_forward(x, w1, b1, w2, b2, None, "relu", 0.0)
            gradients = kernels.feed_forward_backward(
                y, x, w1, b1, w2, pre, None, "relu", 0.0, True
            )
        assert y.shape == (0, 24)
        assert [g.shape for g in gradients] == [x.shape, w1.shape, b1.shape, w2.shape, b2.shape]
        assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_tokens_without_columns(dtype):
    check_no_columns("triton", dtype)
