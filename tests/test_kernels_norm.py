"""The layer norm kernels, executed on the CPU, on awkward shapes against the oracle."""

import pytest
import torch
from block_checks import NormCase, check_layer_norm, check_layer_norm_dropout
from fuseformer.kernels import norm as kernels

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
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_layer_norm_kernels_against_the_oracle_and_repeatable(case):
    check_layer_norm(kernels, case)


@pytest.mark.parametrize(
    ("tokens", "width", "dropout_p"), [(47, 96, 0.1), (21, 1000, 0.75), (19, 4100, 0.3)]
)
def test_dropout_decides_as_defined_both_ways(tokens, width, dropout_p):
    check_layer_norm_dropout(kernels, tokens, width, dropout_p)


def test_dropout_decides_the_same_on_the_cpu_backend():
    check_layer_norm_dropout(fuseformer.cpu.norm, 47, 96, 0.1)


def test_everything_dropped_normalises_the_residual():
    torch.manual_seed(0)
    x, residual, weight = torch.randn(9, 40), torch.randn(9, 40), torch.ones(40)
    dropped = kernels.add_layer_norm_forward(x, residual, weight, None, torch.tensor(3), 1e-5, 1.0)
    plain = kernels.add_layer_norm_forward(
        torch.zeros_like(x), residual, weight, None, None, 1e-5, 0.0
    )
    for a, b in zip(dropped, plain, strict=True):
        assert torch.equal(a, b)
    dx, dresidual, _, _ = kernels.add_layer_norm_backward(
        x, x, residual, weight, *dropped[1:], torch.tensor(3), 1.0, False
    )
    assert not dx.any()
    assert dresidual.any()


def test_no_tokens():
    x, weight = torch.zeros(0, 40, dtype=BF16), torch.ones(40, dtype=BF16)
    y, mean, rstd = kernels.add_layer_norm_forward(x, x, weight, weight, None, 1e-5, 0.0)
    gradients = kernels.add_layer_norm_backward(x, x, x, weight, mean, rstd, None, 0.0, True)
    assert y.shape == x.shape
    assert mean.shape == rstd.shape == (0,)
    assert [g.shape for g in gradients] == [x.shape, x.shape, weight.shape, weight.shape]
    assert not any(gradient.any() for gradient in gradients)


def test_rows_too_wide_are_refused():
    x, weight = torch.zeros(2, 8193), torch.ones(8193)
    with pytest.raises(ValueError, match=r"8193.*8192"):
        kernels.add_layer_norm_forward(x, x, weight, None, None, 1e-5, 0.0)
