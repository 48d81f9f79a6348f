"""Bugs planted in a copy of the decode kernels must be caught by the checks of the real ones."""

import pytest
import torch
from decode_checks import Case, check_decode
from planted import planted_kernels
from ttsem.sanitize import KernelFault

pytestmark = pytest.mark.usefixtures("triton_on_cpu")

FP32 = torch.float32
DECODE, FORWARD, TILES = "decode.py", "attention.py", "attention_tiles.py"
SPLIT = Case((2, 1), 2, 16, FP32, (100, 160), capacity=160)
WHOLE = Case((2, 1), 2, 16, FP32, (0, 40), capacity=48)
GROUPS = Case((4, 2), 1, 16, FP32, (20,), capacity=32)
SMALL_PAGES = Case((2, 1), 1, 16, FP32, (33, 47), 16, 48)
LARGE_PAGES = Case((2, 1), 1, 16, FP32, (100,), 64, 128)
OPEN = Case((2, 1), 3, 16, FP32, (100, 40), capacity=112, window_right=-1)
RIGHT = Case((2, 1), 3, 16, FP32, (100,), capacity=112, window_right=1)
PROMPT = Case((1, 1), 66, 16, FP32, (40, 77), capacity=96)
PROMPT_IN_PAGES = Case((1, 1), 66, 16, FP32, (70, 41), 16, 96)
PROMPT_THAT_SEES_ALL = Case((1, 1), 66, 16, FP32, (70,), 64, 128, window_right=-1)
WINDOW = Case((2, 1), 2, 16, FP32, (100,), capacity=112, window_left=5)
OPTIONS = Case((2, 1), 2, 16, FP32, (100, 160), 0, 160, -1, 3.0, True, True)

# file, correct text, planted text, the case that must fail
BUGS = {
    "the merge does not rescale what it has": (
        DECODE,
        "acc = acc * rescale + tl.sum(",
        "acc = acc + tl.sum(",
        Case((2, 1), 2, 16, FP32, (1200,), capacity=1216),
    ),
    "the merge weighs all splits the same": (
        DECODE,
        "tl.sum(tl.trans(weights) * partial, 0)",
        "tl.sum(partial, 0)",
        SPLIT,
    ),
    "the merge forgets the last split": (
        DECODE,
        "live = tl.cdiv(length - first, tl.maximum(step, 1))",
        "live = tl.maximum(length - first, 0) // tl.maximum(step, 1)",
        SPLIT,
    ),
    "the merge reads splits that wrote nothing": (
        DECODE,
        "mask=split < live",
        "mask=split < splits",
        Case((2, 1), 1, 16, FP32, (300, 70), capacity=304),
    ),
    "the accumulator is not rescaled": (
        DECODE,
        "acc = acc * rescale[:, None]",
        "acc = acc * 1.0",
        WHOLE,
    ),
    "every split reads the first keys": (
        DECODE,
        "begin = first + split * step",
        "begin = first",
        SPLIT,
    ),
    "the page of the block before": (
        TILES,
        "start // PAGE_SIZE * stride_ts",
        "tl.maximum(start - BLOCK_N, 0) // PAGE_SIZE * stride_ts",
        LARGE_PAGES,
    ),
    "a page for all keys of a block": (
        TILES,
        "keys // PAGE_SIZE * stride_ts",
        "(keys * 0 + start) // PAGE_SIZE * stride_ts",
        SMALL_PAGES,
    ),
    "rows of a page from its beginning": (
        TILES,
        "start % PAGE_SIZE + tl.arange",
        "start * 0 + tl.arange",
        LARGE_PAGES,
    ),
    "another sequence's table": (
        TILES,
        "table_ptr += batch.to(tl.int64) * stride_tb",
        "table_ptr += (batch * 0).to(tl.int64) * stride_tb",
        SMALL_PAGES,
    ),
    "pages that do not exist are asked for": (
        TILES,
        "entry = tl.maximum(tl.minimum(entry, pages - 1), 0)",
        "entry = entry + 0",
        Case((2, 1), 1, 16, FP32, (20, 20), 16, 32, broken_pages=True),
    ),
    "one key too few": (
        DECODE,
        "tl.maximum(tl.minimum(length, capacity), 0).to(tl.int32)",
        "tl.maximum(tl.minimum(length, capacity) - 1, 0).to(tl.int32)",
        WHOLE,
    ),
    "one key too many": (
        DECODE,
        "tl.maximum(tl.minimum(length, capacity), 0).to(tl.int32)",
        "tl.maximum(tl.minimum(length + 1, capacity), 0).to(tl.int32)",
        WHOLE,
    ),
    "a query sees the next one": (DECODE, "seen = distance >= 0", "seen = distance >= -1", WHOLE),
    "heads and queries are packed the other way": (
        DECODE,
        "query = row % seqlen_q",
        "query = row // seqlen_q",
        WHOLE,
    ),
    "the wrong key head": (
        DECODE,
        "kv_head = group % (heads // GROUP)",
        "kv_head = (group + 1) % (heads // GROUP)",
        GROUPS,
    ),
    "a window to the wrong side": (
        DECODE,
        "seen & (distance <= window_left)",
        "seen & (distance >= window_left)",
        WINDOW,
    ),
    "a query that sees the future sees keys past the length": (
        DECODE,
        "seen = (keys < end)[None, :]",
        "seen = (keys < end + 1)[None, :]",
        OPEN,
    ),
    "the right side of a window is one key too wide": (
        DECODE,
        "seen & (distance >= -window_right)",
        "seen & (distance >= -window_right - 1)",
        RIGHT,
    ),
    "a window one key too wide": (
        DECODE,
        "distance <= window_left",
        "distance <= window_left + 1",
        WINDOW,
    ),
    "a window that begins a block late": (
        DECODE,
        "tl.maximum(length - seqlen_q - window_left, 0) // BLOCK_N * BLOCK_N",
        "tl.maximum(length - seqlen_q - window_left, 0) // BLOCK_N * BLOCK_N + BLOCK_N",
        WINDOW,
    ),
    "ALiBi counts from the first query": (
        DECODE,
        "slopes[:, None] * tl.abs(distance)",
        "slopes[:, None] * tl.abs(distance - query[:, None])",
        OPTIONS,
    ),
    "the scale is left out beside a softcap": (
        DECODE,
        "(2.0 * LOG2E * sm_scale / softcap)",
        "(2.0 * LOG2E / softcap)",
        OPTIONS,
    ),
    "every split adds the sink": (
        DECODE,
        "factor, lse = finish(row_max, row_sum, None)",
        "factor, lse = finish(row_max, row_sum, tl.load(sinks_ptr + head, mask=real))",
        OPTIONS,
    ),
    "many new tokens: the diagonal ends at the cache's end": (
        FORWARD,
        "BOTTOM_RIGHT=True",
        "BOTTOM_RIGHT=False",
        PROMPT,
    ),
    "many new tokens: the diagonal is one key off": (
        TILES,
        "diagonal = key_end - seqlen_q",
        "diagonal = key_end - seqlen_q + 1",
        PROMPT,
    ),
    "many new tokens: every sequence has the first one's pages": (
        FORWARD,
        "scoring.seqlen_k // PAGE_SIZE, 1, pages",
        "0, 1, pages",
        PROMPT_IN_PAGES,
    ),
    "many new tokens: rows of values by the stride of keys": (
        FORWARD,
        "load_rows(v_base, entry, slots, stride_vb, stride_vs,",
        "load_rows(v_base, entry, slots, stride_vb, stride_ks,",
        Case((2, 2), 66, 16, FP32, (70,), 16, 80),
    ),
    "many new tokens: pages are counted from that of the batch entry": (
        FORWARD,
        "batch if table_ptr is None else batch * 0",
        "batch",
        PROMPT_IN_PAGES,
    ),
    "many new tokens: the key behind the last is read": (
        FORWARD,
        "< scoring.key_end if MASKED",
        "<= scoring.key_end if MASKED",
        PROMPT_IN_PAGES,
    ),
    "many new tokens: those that see the future do not": (
        FORWARD,
        'None, "none", window_left, window_right, softcap',
        'None, "none", window_left, 0, softcap',
        PROMPT_THAT_SEES_ALL,
    ),
}
CASES = {repr(case): case for *_, case in BUGS.values()}


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_caught(name, tmp_path):
    file, correct, wrong, case = BUGS[name]
    with (
        planted_kernels(tmp_path, "decode", file, correct, wrong) as kernels,
        pytest.raises((AssertionError, KernelFault)),
    ):
        check_decode(kernels, case)


def test_the_copy_without_a_bug_passes(tmp_path):
    """Else the tests above would pass for any reason at all."""
    text = "seen = distance >= 0"
    with planted_kernels(tmp_path, "decode", DECODE, text, text) as kernels:
        for case in CASES.values():
            check_decode(kernels, case)
