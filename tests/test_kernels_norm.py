"""The layer norm kernels, executed on the CPU, on awkward shapes against the oracle."""

import pytest
import torch

import fuseformer as ff
from fuseformer.testing import assert_close_to_reference

pytest.importorskip("ttsem")


def run(tensors, precision, backend):
    leaves = [t.to(precision).requires_grad_() for t in tensors]
    out = ff.add_layer_norm(*leaves, dropout_p=0.3, seed=11, backend=backend)
    torch.manual_seed(1)
    upstream = torch.randn(out.shape, dtype=torch.float64)
    return (out, *torch.autograd.grad((out * upstream).sum(), leaves))


@pytest.mark.parametrize(
    ("tokens", "width", "dtype"),
    [
        (1, 40, torch.bfloat16),
        (63, 72, torch.float16),
        (111, 320, torch.float32),
        (257, 128, torch.bfloat16),
    ],
)
def test_layer_norm_kernels_against_the_oracle_and_repeated(tokens, width, dtype, triton_on_cpu):
    torch.manual_seed(0)
    rows = [torch.randn(width, tokens).T for _ in range(2)]
    tensors = [t.to(dtype) for t in (*rows, torch.rand(width) + 0.5, torch.randn(width))]
    actual = run(tensors, dtype, "triton")
    expected, low = run(tensors, torch.float64, "reference"), run(tensors, dtype, "reference")
    for i, (a, e, l_) in enumerate(zip(actual, expected, low, strict=True)):
        assert_close_to_reference(a, e, l_, factor=3 if i else 2, name=f"result {i}")
    for first, second in zip(actual, run(tensors, dtype, "triton"), strict=True):
        assert torch.equal(first, second)
