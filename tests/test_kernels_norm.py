"""The norm kernels, executed on the CPU, on awkward shapes against the oracle."""

import pytest
import torch
from fuseformer.kernels import norm as kernels
from norm_checks import NormCase, check_norm, check_norm_dropout, check_norm_of_the_sum

import fuseformer.backends
import fuseformer.cpu.norm

pytest.importorskip("ttsem")
pytestmark = pytest.mark.usefixtures("triton_on_cpu")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

CASES = [
    NormCase(1, 40, BF16, dropout_p=0.3),
    NormCase(1, 1, FP32),
    NormCase(35, 72, FP16, FP32, dropout_p=0.3),
    NormCase(16, 33, FP16, bias=False),
    NormCase(31, 320, FP32, dropout_p=0.3),
    NormCase(57, 128, BF16, dropout_p=0.5),
    NormCase(33, 96, BF16, FP32, bias=False),
    NormCase(9, 1000, BF16, dropout_p=0.1),
    # more rows than the programs of the backward pass take in one step
    NormCase(63, 8, FP32, dropout_p=0.2, programs=3),
    NormCase(17, 40, BF16, programs=1),
    # widths at which a program takes one row
    NormCase(5, 4097, BF16, dropout_p=0.1),
    NormCase(3, 8192, FP16),
    # a variance beside which eps counts, and none at all
    NormCase(17, 96, FP32, dropout_p=0.2, spread=3e-3),
    NormCase(17, 96, BF16, spread=3e-3),
    NormCase(5, 40, FP32, spread=0.0),
    NormCase(17, 96, FP16, dropout_p=0.3, spread=100.0),
    # without a mean, and with the sum for a second result
    NormCase(1, 40, BF16, dropout_p=0.3, rms=True, pre=True),
    NormCase(1, 1, FP32, rms=True, pre=True),
    NormCase(35, 72, FP16, FP32, dropout_p=0.3, rms=True, pre=True),
    NormCase(63, 33, BF16, rms=True, pre=True, programs=3),
    NormCase(31, 320, FP32, dropout_p=0.3, rms=True),
    NormCase(57, 128, BF16, FP32, rms=True),
    NormCase(113, 40, FP16, dropout_p=0.5, pre=True),
    NormCase(17, 96, FP32, pre=True, bias=False, unused=True),
    NormCase(3, 8192, BF16, dropout_p=0.1, rms=True, pre=True),
    NormCase(3, 4100, FP32, pre=True),
    NormCase(17, 96, FP32, spread=3e-3, rms=True, pre=True),
    NormCase(17, 96, FP16, spread=100.0, rms=True, pre=True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_norm_kernels_against_the_oracle_and_repeatable(case):
    check_norm(kernels, case)


@pytest.mark.parametrize("module", [kernels, fuseformer.cpu.norm])
def test_the_sum_is_normalised_as_returned(module):
    check_norm_of_the_sum(module)


@pytest.mark.parametrize(
    ("tokens", "width", "dropout_p", "pre"),
    [(47, 96, 0.1, False), (21, 1000, 0.75, True), (19, 4100, 0.3, False)],
)
def test_dropout_decides_as_defined_both_ways(tokens, width, dropout_p, pre):
    check_norm_dropout(kernels, tokens, width, dropout_p, pre)


def test_dropout_decides_the_same_on_the_cpu_backend():
    check_norm_dropout(fuseformer.cpu.norm, 47, 96, 0.1)
    check_norm_dropout(fuseformer.cpu.norm, 47, 96, 0.1, pre=True)


@pytest.mark.parametrize("pre", [False, True])
def test_everything_dropped_normalises_the_residual(pre):
    torch.manual_seed(0)
    x, residual, weight = torch.randn(9, 40), torch.randn(9, 40), torch.ones(40)
    seed, options = torch.tensor(3), (False, pre, 1e-5)
    dropped = kernels.add_norm_forward(x, residual, weight, None, seed, *options, 1.0)
    plain = kernels.add_norm_forward(x * 0, residual, weight, None, None, *options, 0.0)
    for a, b in zip(dropped, plain, strict=True):
        assert a is b is None or torch.equal(a, b)
    summands = (dropped[1], None) if pre else (x, residual)
    dx, dresidual, _, _ = kernels.add_norm_backward(
        x, None, *summands, weight, *dropped[2:], seed, 1.0, False
    )
    assert not dx.any()
    assert dresidual.any()


def test_no_tokens():
    x, weight = torch.zeros(0, 40, dtype=BF16), torch.ones(40, dtype=BF16)
    y, total, mean, rstd = kernels.add_norm_forward(
        x, x, weight, weight, torch.tensor(3), False, True, 1e-5, 0.1
    )
    gradients = kernels.add_norm_backward(
        x, x, total, None, weight, mean, rstd, torch.tensor(3), 0.1, True
    )
    assert y.shape == total.shape == x.shape
    assert mean.shape == rstd.shape == (0,)
    assert [g.shape for g in gradients] == [x.shape, x.shape, weight.shape, weight.shape]
    assert not any(gradient.any() for gradient in gradients)


def test_rows_too_wide_are_refused():
    assert kernels.MAX_WIDTH == fuseformer.backends._MAX_NORM_WIDTH
    x, weight = torch.zeros(2, 8193), torch.ones(8193)
    with pytest.raises(ValueError, match=r"8193.*8192"):
        kernels.add_norm_forward(x, x, weight, None, None, False, False, 1e-5, 0.0)
