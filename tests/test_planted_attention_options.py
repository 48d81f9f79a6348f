"""Bugs planted in what acts on the logits of attention must be caught by the checks of it."""

import pytest
import torch
from attention_checks import Case, check_dense, check_packed
from planted import planted_kernels
from ttsem.sanitize import KernelFault

pytestmark = pytest.mark.usefixtures("triton_on_cpu")

FP32 = torch.float32
WINDOW = Case((1, 1), (130, 130), 16, FP32, window=(40, 20))
BIAS = Case((2, 2), (40, 70), 16, FP32, bias="hqk", batch=2)
BIAS_IN_WINDOW = Case((1, 1), (70, 70), 16, FP32, bias="qk", window=(7, 5))
BIAS_AND_LENGTHS = Case(
    (1, 1), (40, 200), 16, FP32, "bottom_right", bias="qk", window=(8, -1), key_lengths=(200, 70),
    batch=2,
)  # fmt: skip
SOFTCAP = Case((1, 1), (33, 40), 16, FP32, softcap=2.0)
ALIBI = Case((2, 2), (33, 40), 16, FP32, "bottom_right", alibi=True)
SINKS = Case((2, 2), (33, 40), 16, FP32, sinks=True)

# file, correct text, planted text, the case that must fail
BUGS = {
    "the left side of a window is one short": (
        "attention_logits.py",
        "starts = rows + (scoring.diagonal - scoring.window_left - column)",
        "starts = rows + (scoring.diagonal - scoring.window_left - column + 1)",
        WINDOW,
    ),
    "the window lies on the wrong side": (
        "attention_logits.py",
        "starts = rows + (scoring.diagonal - scoring.window_left - column)",
        "starts = rows + (scoring.diagonal + scoring.window_left - column)",
        WINDOW,
    ),
    "a block at the left edge counts as full": (
        "attention_logits.py",
        "full = tl.cdiv(full, BLOCK_N) * BLOCK_N",
        "full = full // BLOCK_N * BLOCK_N",
        WINDOW,
    ),
    "blocks before the window's first are skipped": (
        "attention_logits.py",
        "scoring.window_left, 0) // EDGE_N * EDGE_N",
        "scoring.window_left + EDGE_N, 0) // EDGE_N * EDGE_N",
        WINDOW,
    ),
    "blocks behind the full ones are read before them": (
        "attention_logits.py",
        "position = tl.where(place < head_end, place, place + gap)",
        "position = place",
        WINDOW,
    ),
    "the last rows of a window never reach dk": (
        "attention_logits.py",
        "end = tl.minimum(end, row_end + BLOCK_N - 1)",
        "end = tl.minimum(end, row_end)",
        WINDOW,
    ),
    "rows at the window's end count as full for dk": (
        "attention_logits.py",
        "full_end = tl.minimum(full_end, row_end)",
        "full_end = tl.minimum(full_end, row_end + BLOCK_M)",
        WINDOW,
    ),
    "every head reads the bias of the first": (
        "attention_logits.py",
        "head.to(tl.int64) * aligned(stride_h, BIAS_ALIGN)",
        "head.to(tl.int64) * 0",
        BIAS,
    ),
    "rows and keys of the bias are exchanged": (
        "attention_logits.py",
        "row_offsets = tl.expand_dims(local_rows * scoring.stride_bias_m, AXIS)",
        "row_offsets = tl.expand_dims(local_rows * scoring.stride_bias_n, AXIS)",
        BIAS,
    ),
    "the bias gradient misses a batch entry": (
        "attention_bias_gradient.py",
        "range(part, shared, parts)",
        "range(part, shared - 1, parts)",
        BIAS,
    ),
    "the bias gradient adds parts twice": (
        "attention_bias_gradient.py",
        "range(part, shared, parts)",
        "range(0, shared, parts)",
        BIAS,
    ),
    "the bias gradient skips a tile that a window touches": (
        "attention_bias_gradient.py",
        "last_key < row + diagonal - window_left",
        "last_key < row + diagonal + BLOCK_M - 1 - window_left",
        BIAS_IN_WINDOW,
    ),
    "the bias gradient has no delta": (
        "attention_bias_gradient.py",
        "delta = tl.load(delta_ptr + places, mask=real, other=0.0)",
        "delta = 0.0 * tl.load(delta_ptr + places, mask=real, other=0.0)",
        BIAS,
    ),
    "the gradient of the softcap is forgotten": (
        "attention_gradients.py",
        " * derivative",
        " * 1.0",
        SOFTCAP,
    ),
    "the softcap scales what it bounds": (
        "attention_logits.py",
        "(2.0 * scoring.scale_log2 / scoring.softcap)",
        "(1.0 * scoring.scale_log2 / scoring.softcap)",
        SOFTCAP,
    ),
    "the bias gradient skips by the diagonal at the end of the keys": (
        "attention_bias_gradient.py",
        "(cu_seqlens_q is None and key_lengths is None) or not BOTTOM_RIGHT",
        "cu_seqlens_q is None or not BOTTOM_RIGHT",
        BIAS_AND_LENGTHS,
    ),
    "distances are those of the other alignment": (
        "attention_logits.py",
        "places = tl.expand_dims(rows + scoring.diagonal, AXIS)",
        "places = tl.expand_dims(rows, AXIS)",
        ALIBI,
    ),
    "a sink takes no mass": (
        "attention.py",
        "row_sum = row_sum * rescale + tl.exp2(sink - shift)",
        "row_sum = row_sum * rescale",
        SINKS,
    ),
    "the gradient of a sink has no delta": (
        "attention_backward.py",
        "total + delta * (1 - weights)",
        "total",
        SINKS,
    ),
    "the gradient of a sink forgets that of the lse": (
        "attention_backward.py",
        "exact -= dlse",
        "exact -= 0",
        SINKS,
    ),
    "masked blocks are missing in the sums of the gradient of a sink": (
        "attention_gradients.py",
        "total += tl.sum(dlogits, 1)",
        "total += tl.sum(dlogits, 1) * (not MASKED)",
        SINKS,
    ),
}
# The same for packed sequences with a bias.
PACKED_BUGS = {
    "the bias gradient reads the lse of the first sequence": (
        "stride_lh + start_q + rows",
        "stride_lh + rows",
    ),
    "the bias gradient counts the rows of the next sequence": (
        "real = rows < rows_end",
        "real = rows < seqlen_q",
    ),
    "the bias gradient reads the keys of the first sequence": (
        "head_base(k_ptr, batch, kv_head, start_k,",
        "head_base(k_ptr, batch, kv_head, start_k * 0,",
    ),
    "the bias gradient skips a tile that a short sequence ends in": (
        "row < rows_end and first_key < key_end",
        "row + BLOCK_M <= rows_end and first_key < key_end",
    ),
    "the bias gradient skips by the diagonal of no sequence": (
        "(cu_seqlens_q is None and key_lengths is None) or not BOTTOM_RIGHT",
        "True",
    ),
}
PACKED = ((40, 33), (9, 70), (70, 20))


def check_packed_bias(kernels):
    check_packed(kernels, PACKED, 16, FP32, "bottom_right", 0.0, window=(10, -1), bias="hqk")


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_caught(name, tmp_path):
    file, correct, wrong, case = BUGS[name]
    with (
        planted_kernels(tmp_path, "attention", file, correct, wrong) as kernels,
        pytest.raises((AssertionError, KernelFault)),
    ):
        check_dense(kernels, case)


@pytest.mark.parametrize("name", PACKED_BUGS)
def test_a_bug_planted_for_packed_sequences_is_caught(name, tmp_path):
    file = "attention_bias_gradient.py"
    with (
        planted_kernels(tmp_path, "attention", file, *PACKED_BUGS[name]) as kernels,
        pytest.raises((AssertionError, KernelFault)),
    ):
        check_packed_bias(kernels)


def test_the_copy_without_a_bug_passes(tmp_path):
    """Else the tests above would pass for any reason at all."""
    text = "kv_head = head // GROUP"
    with planted_kernels(tmp_path, "attention", "attention.py", text, text) as kernels:
        for case in (WINDOW, BIAS, BIAS_IN_WINDOW, BIAS_AND_LENGTHS, SOFTCAP, ALIBI, SINKS):
            check_dense(kernels, case)
        check_packed_bias(kernels)
