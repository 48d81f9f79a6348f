"""The Triton attention kernels, executed on the CPU, against the oracle in float64."""

import pytest
import torch
from attention_checks import (
    NO_OPTIONS,
    Case,
    check_dense,
    check_dropout_mask,
    check_packed,
    compare,
)
from fuseformer.kernels import attention as kernels
from interpreted import run_interpreted

from fuseformer import reference

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
NO_MASKS = (None, None, None, None, None)

pytestmark = pytest.mark.usefixtures("triton_on_cpu")

CASES = [
    # whole blocks only
    Case((2, 2), (256, 256), 64, BF16),
    Case((1, 1), (128, 128), 128, FP16, "top_left"),
    # every awkward length and head dim, both diagonals, grouped heads
    Case((6, 2), (113, 257), 64, BF16, "bottom_right", batch=2),
    Case((5, 1), (257, 113), 40, FP16, "bottom_right"),
    Case((6, 2), (257, 63), 96, FP16, "top_left"),
    Case((2, 1), (111, 1), 16, BF16),
    Case((1, 1), (1, 1), 8, BF16, "top_left"),
    Case((2, 2), (1, 257), 256, FP16, key_lengths=(200,)),
    Case((1, 1), (113, 111), 256, BF16, "top_left"),
    Case((1, 1), (257, 257), 72, BF16, "top_left"),
    # padding, whole sequences of it too, and both kinds together
    Case((2, 1), (63, 111), 80, FP16, "top_left", 0.1, key_lengths=(0, 111, 50), batch=3),
    Case((2, 2), (111, 63), 72, BF16, padding=True, batch=2),
    Case((2, 1), (113, 113), 64, BF16, "bottom_right", 0.2, (113, 70), padding=True, batch=2),
    # a diagonal that ends at a length, shorter than the queries too
    Case((2, 1), (113, 257), 64, BF16, "bottom_right", 0.0, (257, 130, 40, 0), batch=4),
    Case((1, 1), (257, 300), 128, FP16, "bottom_right", 0.1, (190,)),
    # dropout where several blocks meet
    Case((1, 1), (257, 257), 128, BF16, "top_left", 0.3),
    Case((2, 1), (257, 113), 32, FP16, "none", 0.5),
    # single precision
    Case((6, 2), (113, 63), 96, FP32, "bottom_right", padding=True, batch=2),
    Case((1, 1), (63, 113), 40, FP32, "none", 0.2, key_lengths=(77,)),
    Case((1, 1), (63, 65), 256, FP32, "top_left"),
    Case((1, 1), (65, 63), 128, FP32),
    # any scale
    Case((2, 1), (63, 65), 16, FP32, "top_left", scale=-0.3),
    Case((2, 1), (63, 65), 16, BF16, "top_left", scale=0.0),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_dense_calls_match_the_oracle(case):
    check_dense(kernels, case)


@pytest.mark.parametrize(
    ("sequences", "head_dim", "dtype", "causal", "dropout_p", "unowned"),
    [
        (((63, 63), (1, 1), (111, 111)), 64, BF16, "top_left", 0.0, 0),
        (((113, 257), (0, 5), (17, 0), (130, 40)), 40, FP16, "bottom_right", 0.25, 0),
        (((5, 9), (64, 33)), 32, FP32, "none", 0.1, 12),
    ],
)
def test_packed_sequences_match_the_oracle(sequences, head_dim, dtype, causal, dropout_p, unowned):
    check_packed(kernels, sequences, head_dim, dtype, causal, dropout_p, unowned)


@pytest.mark.parametrize("dropout_p", [0.1, 0.75])
def test_dropout_decides_as_defined_in_every_pass(dropout_p):
    check_dropout_mask(kernels, dropout_p)


def test_everything_dropped_gives_zero():
    q = torch.ones(1, 1, 16, 16, dtype=BF16)
    options = (torch.tensor(3), "none", *NO_OPTIONS, 1.0, 1.0)
    out, lse = kernels.attention_forward(q, q, q, *NO_MASKS, *options)
    grads = kernels.attention_backward(q, None, q, q, q, out, lse, *NO_MASKS, *options, False)
    assert not out.any()
    assert lse.isfinite().all()
    assert not any(grad.any() for grad in grads[:3])


def test_inputs_may_be_expanded_sliced_and_misaligned():
    torch.manual_seed(0)
    q = torch.randn(2, 4, 63, 90, dtype=BF16)[..., 1:65]  # no row starts on 16 bytes
    k = torch.randn(1, 1, 111, 64, dtype=BF16).expand(2, 4, 111, 64)
    v = torch.randn(111, 2, 4, 64, dtype=BF16).permute(1, 2, 0, 3)
    dout = torch.ones((), dtype=BF16).expand(2, 4, 63, 64)  # as `out.sum().backward()` gives
    options = (None, "top_left", *NO_OPTIONS, 0.125, 0.0)
    out, lse = kernels.attention_forward(q, k, v, *NO_MASKS, *options)
    dq, dk, dv, _, _ = kernels.attention_backward(
        dout, None, q, k, v, out, lse, *NO_MASKS, *options, False
    )
    compare(
        (out, lse, dq, dk, dv),
        lambda q, k, v: reference.attention(q, k, v, causal="top_left", scale=0.125),
        (q, k, v),
        dout,
        None,
    )


@pytest.mark.parametrize(("batch", "sq", "sk"), [(0, 5, 5), (2, 0, 5), (2, 5, 0), (2, 0, 0)])
def test_empty_tensors(batch, sq, sk):
    q, k = torch.ones(batch, 2, sq, 16, dtype=BF16), torch.ones(batch, 1, sk, 16, dtype=BF16)
    options = (None, "bottom_right", *NO_OPTIONS, 1.0, 0.0)
    out, lse = kernels.attention_forward(q, k, k, *NO_MASKS, *options)
    grads = kernels.attention_backward(q, None, q, k, k, out, lse, *NO_MASKS, *options, False)
    assert out.shape == q.shape
    assert not out.any()
    assert (lse == -torch.inf).all()
    for grad, tensor in zip(grads, (q, k, k), strict=False):
        assert grad.shape == tensor.shape
        assert not grad.any()


def test_empty_packed_tensors():
    q, cu = torch.ones(0, 2, 16, dtype=BF16), torch.zeros(3, dtype=torch.int32)
    packing = (cu, cu, 0, 0, None, None, None)
    options = (None, "none", *NO_OPTIONS, 1.0, 0.0)
    out, lse = kernels.varlen_attention_forward(q, q, q, *packing, *options)
    grads = kernels.varlen_attention_backward(q, None, q, q, q, out, lse, *packing, *options, False)
    assert lse.shape == (2, 0)
    assert [grad.shape for grad in (out, *grads[:3])] == [q.shape] * 4


def test_a_length_past_the_keys_is_their_number():
    torch.manual_seed(0)
    q = torch.randn(1, 1, 16, 16, dtype=FP16)
    options = (None, "none", *NO_OPTIONS, 1.0, 0.0)
    plain, _ = kernels.attention_forward(q, q, q, *NO_MASKS, *options)
    for dtype in (torch.int32, torch.int64):
        lengths = torch.tensor([99], dtype=dtype)
        out, _ = kernels.attention_forward(q, q, q, None, None, lengths, None, None, *options)
        assert torch.equal(out, plain)


def test_tf32_follows_the_setting_of_pytorch():
    torch.manual_seed(0)
    q = torch.randn(1, 1, 32, 32)
    options = (None, "none", *NO_OPTIONS, 1.0, 0.0)
    exact, _ = kernels.attention_forward(q, q, q, *NO_MASKS, *options)
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        rounded, _ = kernels.attention_forward(q, q, q, *NO_MASKS, *options)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert 1e-5 < (rounded - exact).abs().max() < 1e-2


PAST_32_BITS = """
import torch
from fuseformer.kernels import attention as kernels

room = torch.empty(2**31 + 2**29, dtype=torch.float16)  # of which little is ever touched
far_rows = (0, 0, 2**27, 1)
options = (None, "top_left", 12, -1, 0.0, 0.25, 0.0)
for shape, strides in (
    ((2, 1, 18, 16), (2**31 + 64, 16, 16, 1)),
    ((1, 2, 18, 16), (0, 2**31 + 64, 16, 1)),
    ((1, 1, 18, 16), far_rows),
):
    x = room.as_strided(shape, strides).normal_()
    dense = x.contiguous()
    bias = room[512:].as_strided((1, 1, 18, 18), far_rows).normal_()
    got = []
    for q, b in ((x, bias), (dense, bias.contiguous())):
        given = (b, None, None, None, None, *options)
        out, lse = kernels.attention_forward(q, q, q, *given)
        grads = kernels.attention_backward(q, None, q, q, q, out, lse, *given, True)
        got.append((out, lse, *grads[:4]))
    for far, near in zip(*got):
        assert far.isfinite().all()
        assert torch.equal(far, near)
print("reached")
"""


def test_tensors_of_more_than_2_to_the_31_elements():
    """In Triton's interpreter, which does not shadow the memory that a tensor spans."""
    assert run_interpreted(PAST_32_BITS) == "reached\n"
