"""The rotary kernels, executed on the CPU, on awkward shapes against the oracle."""

import pytest
import torch
from fuseformer.kernels import rotary as kernels
from fuseformer.kernels.common import recorded_launches
from rotary_checks import RotaryCase, check_rotary

import fuseformer as ff
import fuseformer.cpu.rotary

pytest.importorskip("ttsem")
pytestmark = pytest.mark.usefixtures("triton_on_cpu")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

CASES = [
    RotaryCase((1, 1, 1, 1, 8), 4, FP32),
    RotaryCase((2, 5, 1, 63, 40), 20, BF16),
    RotaryCase((2, 6, 2, 113, 72), 36, FP16, interleaved=True),
    # part of a head, in tables of their own for each sequence
    RotaryCase((3, 6, 2, 17, 80), 16, BF16, batched=True),
    RotaryCase((2, 5, 1, 63, 96), 19, FP32, batched=True, interleaved=True),
    RotaryCase((1, 4, 4, 33, 256), 32, FP16),
    RotaryCase((1, 2, 1, 5, 256), 128, BF16, interleaved=True),
    # more positions than a block has, heads beside positions, a slice of a wider tensor
    RotaryCase((1, 9, 3, 257, 16), 8, FP32, layout="transposed"),
    RotaryCase((2, 4, 2, 63, 64), 32, BF16, layout="packed"),
    RotaryCase((2, 4, 2, 17, 40), 12, FP16, layout="packed", interleaved=True),
    RotaryCase((2, 4, 2, 17, 40), 12, FP32, layout="last"),
    RotaryCase((2, 4, 2, 9, 24), 12, BF16, layout="expanded"),
    # nothing to turn, nobody to turn it for
    RotaryCase((2, 4, 2, 9, 24), 0, BF16),
    RotaryCase((2, 4, 2, 0, 24), 12, BF16),
    RotaryCase((0, 4, 2, 9, 24), 12, FP32),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rotary_kernels_against_the_oracle_and_repeatable(case):
    check_rotary(kernels, case)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_cpu_backend_satisfies_the_same_checks(case):
    check_rotary(fuseformer.cpu.rotary, case)


@pytest.mark.parametrize("head_dim", [36, 72, 128])
def test_a_new_batch_length_or_number_of_heads_compiles_nothing_new(head_dim):
    sources = set()
    with recorded_launches("sm_80") as specs:
        for batch, heads, length in ((1, 1, 1), (2, 8, 64), (3, 5, 113), (1, 32, 4096)):
            q = torch.empty(batch, length, heads, head_dim, dtype=BF16, device="meta")
            q = q.transpose(1, 2)
            cos = torch.empty(length, head_dim // 2, device="meta")
            kernels.rotate(q, q, q.clone(), q.clone(), cos, cos, False, False)
    for spec in specs:
        source = spec.source()
        sources.add(repr((source.signature, source.constants, source.attrs)))
    assert len(specs) == 4
    assert len(sources) == 1


@pytest.mark.parametrize("backend", ["triton", "cpu", "reference"])
def test_in_place_by_the_public_function(backend):
    torch.manual_seed(0)
    qkv = torch.randn(2, 17, 8, 40)
    before = qkv.clone()
    angle = torch.rand(17, 12)
    q, k = qkv[:, :, :4].transpose(1, 2), qkv[:, :, 4:6].transpose(1, 2)
    expected = ff.rotary(q, k, angle.cos(), angle.sin(), backend="reference")
    found = ff.rotary(q, k, angle.cos(), angle.sin(), inplace=True, backend=backend)
    assert found[0] is q
    assert found[1] is k
    torch.testing.assert_close((q, k), expected)
    assert torch.equal(qkv[:, :, 6:], before[:, :, 6:])
