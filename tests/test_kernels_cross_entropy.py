"""The cross entropy kernels, executed on the CPU, on awkward vocabularies against the oracle."""

import pytest
import torch

import fuseformer as ff
from fuseformer.testing import assert_close_to_reference

pytest.importorskip("ttsem")


def run(tensors, target, precision, backend, reduction):
    leaves = [t.to(precision).requires_grad_() for t in tensors]
    hidden, weight, bias = leaves
    out = ff.linear_cross_entropy(
        hidden,
        weight,
        target,
        bias=bias,
        label_smoothing=0.1,
        softcap=5.0,
        reduction=reduction,
        backend=backend,
    )
    return (out, *torch.autograd.grad(out.sum(), leaves))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(
    ("tokens", "vocab", "dtype"),
    [(1, 1, torch.float32), (63, 7, torch.float16), (111, 1000, torch.bfloat16)],
)
def test_cross_entropy_kernels_against_the_oracle(tokens, vocab, dtype, reduction, triton_on_cpu):
    torch.manual_seed(0)
    tensors = [torch.randn(tokens, 40), torch.randn(vocab, 40) / 6, torch.randn(vocab)]
    tensors = [t.to(dtype) for t in tensors]
    target = torch.randint(0, vocab, (tokens,))
    target[1::3] = -100
    results = [
        run(tensors, target, precision, backend, reduction)
        for backend, precision in (
            ("triton", dtype),
            ("reference", torch.float64),
            ("reference", dtype),
        )
    ]
    for i, (a, e, low) in enumerate(zip(*results, strict=True)):
        assert_close_to_reference(a, e, low, factor=3 if i else 2, name=f"result {i}")
