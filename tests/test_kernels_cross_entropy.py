"""The cross entropy kernels, executed on the CPU, on awkward vocabularies against the oracle."""

import pytest
import torch
from block_checks import CrossEntropyCase, check_cross_entropy
from fuseformer.kernels import cross_entropy as kernels

import fuseformer as ff

pytest.importorskip("ttsem")
pytestmark = pytest.mark.usefixtures("triton_on_cpu")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

Case = CrossEntropyCase
CASES = [
    # one row, one class, and vocabularies about a block
    Case((1, 40, 1), FP32, ignored=0.0),
    Case((1, 40, 1000), BF16, ignored=0.0, fused=False),
    Case((63, 40, 7), FP16, "sum", 0.1, 5.0, bias=True),
    Case((17, 24, 31), FP32, "none", fused=False),
    Case((17, 24, 33), BF16, "none", 0.1, bias=True, fused=False),
    # several blocks to a row, the last one ragged
    Case((5, 16, 4097), FP32, "mean", 0.1, 5.0, bias=True),
    Case((9, 24, 8200), BF16, "mean", fused=False),
    Case((4, 8, 12288), FP16, "sum", 0.3, ignored=0.0),
    # every option, both ways to the gradients, in low precision
    Case((111, 40, 1000), BF16, "mean", 0.1, 5.0, bias=True),
    Case((111, 40, 1000), FP16, "mean", 0.1, 5.0, bias=True, fused=False),
    Case((63, 40, 100), BF16, "none", 0.2, 30.0, fused=False),
    Case((63, 40, 100), FP32, "sum", 1.0, bias=True),
    # the squared lse costs too: beside every option, in both passes, with a lse of both signs
    Case((63, 40, 100), BF16, "mean", 0.1, 5.0, bias=True, z_loss=1e-2),
    Case((63, 40, 100), FP16, "sum", z_loss=1e-3),
    Case((33, 24, 1), FP32, "none", 0.1, z_loss=0.5, fused=False),
    Case((17, 24, 4100), FP32, "mean", 0.2, 30.0, bias=True, z_loss=0.1, fused=False),
    Case((13, 24, 50), BF16, "sum", z_loss=0.1, fused=False, chunked=True),
    Case((13, 24, 50), FP32, "mean", z_loss=0.1, captured=True),
    Case((9, 16, 50), FP32, "mean", z_loss=0.1, forbidden=20),
    # no row that counts
    Case((7, 24, 50), FP32, "sum", bias=True, ignored=1.0, z_loss=0.1),
    Case((7, 24, 50), FP32, "mean", 0.1, bias=True, ignored=1.0),
    Case((7, 24, 50), BF16, "sum", ignored=1.0, fused=False),
    Case((7, 24, 50), BF16, "none", ignored=1.0, bias=True, fused=False),
    # a chunk of logits for each row, and every row handed to the kernel
    Case((13, 24, 50), BF16, "mean", 0.1, bias=True, chunked=True),
    Case((13, 24, 50), FP32, "none", bias=True, fused=False, chunked=True),
    Case((33, 24, 50), BF16, "mean", 0.1, bias=True, captured=True),
    Case((33, 24, 4100), FP16, "none", 0.0, 5.0, fused=False, captured=True),
    Case((7, 24, 50), FP32, "sum", ignored=1.0, captured=True),
    # classes that are never to be predicted, some of them a whole block
    Case((9, 16, 4500), FP32, "mean", forbidden=4200),
    Case((9, 16, 4500), BF16, "sum", forbidden=4096, fused=False),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_cross_entropy_kernels_against_the_oracle_and_repeatable(case):
    check_cross_entropy(kernels, case)


def test_a_class_out_of_range_is_seen_in_its_row_alone():
    torch.manual_seed(0)
    hidden, weight = torch.randn(4, 24), torch.randn(50, 24)
    target = torch.tensor([3, 50, -1, 49])
    options = (-100, 0.0, 0.0, 1e-2, "none")
    loss, lse, *_ = kernels.linear_cross_entropy_forward(
        hidden, weight, None, target, *options, False
    )
    dhidden, _, _ = kernels.linear_cross_entropy_backward(
        torch.ones(4), hidden, weight, None, target, lse, *options
    )
    wrong = torch.tensor([False, True, True, False])
    assert torch.equal(loss.isnan(), wrong)
    assert torch.equal(dhidden.isnan(), wrong[:, None].expand(4, 24))


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_public_function_without_a_row_that_counts(reduction, z_loss):
    hidden = torch.randn(4, 8, requires_grad=True)
    weight = torch.randn(9, 8, requires_grad=True)
    loss = ff.linear_cross_entropy(
        hidden,
        weight,
        torch.full((4,), -100),
        z_loss=z_loss,
        reduction=reduction,
        backend="triton",
    )
    expected = torch.nn.functional.cross_entropy(
        hidden @ weight.T, torch.full((4,), -100), reduction=reduction
    )
    torch.testing.assert_close(loss, expected, rtol=0, atol=0, equal_nan=True)


def test_no_rows():
    hidden, weight, bias = torch.zeros(0, 8), torch.randn(9, 8), torch.randn(9)
    target = torch.zeros(0, dtype=torch.int64)
    loss, lse, dhidden, dweight, dbias = kernels.linear_cross_entropy_forward(
        hidden, weight, bias, target, -100, 0.0, 0.0, 1e-2, "sum", True
    )
    assert loss == 0
    assert lse.shape == (0,)
    assert dhidden.shape == hidden.shape
    assert not dweight.any()
    assert not dbias.any()
