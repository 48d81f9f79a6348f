"""Bugs planted in a copy of the attention kernels must be caught by the checks of the real ones."""

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from attention_checks import Case, check_dense, check_dropout_mask, check_packed
from planted import planted_kernels
from ttsem.sanitize import KernelFault

pytestmark = pytest.mark.usefixtures("triton_on_cpu")

BF16, FP16 = torch.bfloat16, torch.float16
SMALL = Case((1, 1), (63, 65), 16, FP16, "top_left")
LENGTHS = Case((1, 1), (40, 70), 16, FP16, "bottom_right", key_lengths=(33, 70), batch=2)
TWO_BLOCKS = Case((1, 1), (16, 200), 16, FP16)


def dense(case: Case) -> Callable[[ModuleType], None]:
    return lambda kernels: check_dense(kernels, case)


# file, correct text, planted text, the check that must fail
BUGS = {
    "the causal mask hides the diagonal": (
        "attention_logits.py",
        "shift = scoring.diagonal + scoring.window_right + 1 - column",
        "shift = scoring.diagonal + scoring.window_right - column",
        dense(SMALL),
    ),
    "the causal mask lets one future key in": (
        "attention_logits.py",
        "seen = places < tl.expand_dims(ends, AXIS)",
        "seen = places <= tl.expand_dims(ends, AXIS)",
        dense(SMALL),
    ),
    "the block on the diagonal counts as full": (
        "attention_logits.py",
        "full_end = tl.minimum(full_end, row + scoring.diagonal + scoring.window_right + 1)",
        "full_end = tl.minimum(full_end, row + scoring.diagonal + BLOCK_N)",
        dense(Case((1, 1), (128, 128), 64, FP16, "top_left")),
    ),
    "the accumulator is not rescaled": (
        "attention.py",
        "acc = acc * rescale[:, None]",
        "acc = acc * 1.0",
        dense(TWO_BLOCKS),
    ),
    "the row sum is not rescaled": (
        "attention.py",
        "row_sum = row_sum * rescale + ",
        "row_sum = row_sum + ",
        dense(TWO_BLOCKS),
    ),
    "rows without keys are not guarded": (
        "attention.py",
        'shift = tl.where(new_max == -float("inf"), 0.0, new_max)',
        "shift = new_max",
        dense(Case((1, 1), (40, 20), 16, FP16, "bottom_right")),
    ),
    "delta forgets the gradient of lse": (
        "attention_backward.py",
        "delta -= tl.load(",
        "delta -= 0.0 * tl.load(",
        dense(SMALL),
    ),
    "dq reads the delta of other rows": (
        "attention_gradients.py",
        "delta = tl.load(delta_ptr + rows_base + rows,",
        "delta = tl.load(delta_ptr + rows_base + rows - pid % 2 * BLOCK_M,",
        dense(Case((1, 1), (257, 64), 64, FP16)),
    ),
    "dk keeps the delta of the first block of rows": (
        "attention_gradients.py",
        "delta = tl.load(delta_base + rows)  # (BLOCK_M,)",
        "delta = tl.load(delta_base + rows - row + begin)  # (BLOCK_M,)",
        dense(Case((1, 1), (257, 64), 64, FP16)),
    ),
    "query heads read the wrong key head": (
        "attention.py",
        "kv_head = head // GROUP",
        "kv_head = head % (heads // GROUP)",
        dense(Case((4, 2), (16, 16), 16, FP16)),
    ),
    "only the first head of a group reaches dk": (
        "attention_gradients.py",
        "head = kv_head * GROUP + member",
        "head = kv_head * GROUP + member * 0",
        dense(Case((4, 2), (16, 16), 16, FP16)),
    ),
    "the last rows never reach dk": (
        "attention_logits.py",
        "end = head_end + tl.maximum(end - tail, 0)",
        "end = head_end + tl.maximum(end - tail - 1, 0)",
        dense(Case((1, 1), (33, 33), 16, FP16)),
    ),
    "the tail of the keys is read": (
        "attention_tiles.py",
        "tl.arange(0, BLOCK)[:, None] < rows - row  # (BLOCK, 1)\n    real_column = tl.arange(0, "
        "BLOCK_D)[None, :] < HEAD_DIM  # (1, BLOCK_D)\n    if",
        "tl.arange(0, BLOCK)[:, None] <= rows - row  # (BLOCK, 1)\n    real_column = tl.arange(0, "
        "BLOCK_D)[None, :] < HEAD_DIM  # (1, BLOCK_D)\n    if",
        dense(Case((1, 1), (17, 17), 16, FP16)),
    ),
    "padded keys keep their gradient": (
        "attention_gradients.py",
        "dv = tl.where(real[:, None], dv, 0.0)",
        "dv = tl.where(keys[:, None] < seqlen_k, dv, 0.0)",
        dense(Case((1, 1), (16, 40), 16, FP16, key_lengths=(20,))),
    ),
    "a length does not move the diagonal": (
        "attention_tiles.py",
        "diagonal = key_end - seqlen_q",
        "diagonal = seqlen_k - seqlen_q",
        dense(LENGTHS),
    ),
    "the diagonal at a length is one key off": (
        "attention_tiles.py",
        "diagonal = key_end - seqlen_q",
        "diagonal = key_end - seqlen_q + (key_end < seqlen_k)",
        dense(LENGTHS),
    ),
    "the backward pass drops other elements": (
        "attention_gradients.py",
        "dropout_keep(seed, batch, head, row, first_key, threshold, BLOCK_M, BLOCK_N)",
        "dropout_keep(seed, batch, head + 1, row, first_key, threshold, BLOCK_M, BLOCK_N)",
        lambda kernels: check_dropout_mask(kernels, 0.5),
    ),
    "a packed sequence starts one row early": (
        "attention_tiles.py",
        "start_k = tl.load(cu_seqlens_k + batch)",
        "start_k = tl.load(cu_seqlens_k + batch) - batch",
        lambda kernels: check_packed(kernels, ((8, 8), (8, 8)), 16, FP16, "none", 0.0),
    ),
}


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_caught(name, tmp_path):
    file, correct, wrong, check = BUGS[name]
    with (
        planted_kernels(tmp_path, "attention", file, correct, wrong) as kernels,
        pytest.raises((AssertionError, KernelFault)),
    ):
        check(kernels)


def test_the_copy_without_a_bug_passes(tmp_path):
    """Else the tests above would pass for any reason at all."""
    text = "kv_head = head // GROUP"
    with planted_kernels(tmp_path, "attention", "attention.py", text, text) as kernels:
        for case in (SMALL, TWO_BLOCKS, LENGTHS):
            check_dense(kernels, case)
        check_packed(kernels, ((8, 8), (8, 8)), 16, FP16, "none", 0.0)
