"""The gated feed-forward kernels executed on the CPU, all regimes, against the oracle."""

import pytest
import torch
from fuseformer.kernels import gated_feed_forward as kernels
from gated_checks import GatedCase, check_gated, check_gated_dropout, served_by

import fuseformer.cpu.feed_forward

pytest.importorskip("ttsem")
pytestmark = pytest.mark.usefixtures("triton_on_cpu")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

Case = GatedCase
CASES = [
    Case((1, 40, 72, 40), "silu", FP32),
    Case((63, 33, 130, 24), "gelu", FP32, 0.3),
    Case((49, 320, 129, 40), "silu", BF16, 0.2),
    Case((63, 40, 100, 264), "gelu_tanh", FP16),
    Case((33, 40, 72, 40), "relu", BF16, 0.5),
    Case((1, 40, 72, 40), "silu", BF16, regime="resident"),
    Case((113, 24, 40, 17), "silu", FP16, 0.3, "resident", chunked=True),
    Case((65, 72, 100, 96), "gelu", BF16, 0.2, "resident", chunked=True),
    Case((70, 128, 65, 128), "relu", FP16, regime="resident"),
    Case((63, 200, 40, 256), "gelu_tanh", BF16, regime="resident"),
    Case((1, 40, 72, 40), "silu", BF16, 0.3, "few rows"),
    Case((16, 72, 300, 33), "gelu", FP16, regime="few rows"),
    Case((7, 320, 1100, 40), "silu", BF16, 0.2, "few rows"),
    Case((3, 264, 40, 40), "relu", FP16, regime="few rows"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_the_oracle_and_repeatable(case):
    check_gated(kernels, case)


@pytest.mark.parametrize(
    ("size", "dropout_p", "regime"),
    [(72, 0.75, "resident"), (40, 0.1, "epilogue"), (16, 0.5, "few rows")],
)
def test_dropout_decides_as_defined_both_ways(size, dropout_p, regime):
    with served_by(kernels, regime, chunked=True):
        check_gated_dropout(kernels, size, dropout_p)


def test_dropout_decides_the_same_on_the_cpu_backend():
    check_gated_dropout(fuseformer.cpu.feed_forward, 80, 0.1)


@pytest.mark.parametrize(("tokens", "width"), [(1, 264), (16, 264), (17, 264), (300, 264), (1, 40)])
def test_what_is_saved_does_not_depend_on_the_number_of_tokens(tokens, width):
    x, w = torch.ones(tokens, width, dtype=BF16), torch.ones(24, width, dtype=BF16)
    _, pre, up = kernels.gated_feed_forward_forward(x, w, w, w.T, None, "silu", 0.0)
    expected = (tokens, 24) if width == 264 else (0,)
    assert pre.shape == up.shape == expected


@pytest.mark.parametrize("hidden", [0, 24])
@pytest.mark.parametrize("tokens", [0, 5])
def test_nothing_to_do(tokens, hidden):
    shapes = ((tokens, 40), (hidden, 40), (hidden, 40), (17, hidden))
    tensors = [torch.ones(shape, dtype=BF16) for shape in shapes]
    y, pre, up = kernels.gated_feed_forward_forward(*tensors, None, "silu", 0.0)
    assert y.shape == (tokens, 17)
    assert not hidden or not tokens or y.all()
    gradients = kernels.gated_feed_forward_backward(y, *tensors, pre, up, None, "silu", 0.0)
    assert [g.shape for g in gradients] == [t.shape for t in tensors]
