"""Bugs planted in the CUDA C++ decode kernels must be caught by the checks of the real ones."""

import pytest
import torch
from decode_checks import Case, check_decode
from emulated import Kernels
from emulator_build import build, build_planted
from planted_emulated import (
    BOUNDS,
    INFLIGHT,
    NAN,
    RACE,
    UNINITIALISED,
    WRONG,
    check_caught,
)

BF16 = torch.bfloat16
FILE = "attention/decode_kernel.h"
# Head dim 64 alone: what is planted is compiled for each bug.
KERNELS = """
#include "attention/decode_launch.h"
#include "attention/entry.h"
namespace fuseformer {
template <>
const char* attention_decode<Bfloat16>(const DecodeParams& params, int, Stream stream) {
  return launch_decode<DecodeTraits<Bfloat16, 64>>(params, stream);
}
#define NOT_BUILT(function, Params)                                           \\
  template <>                                                                 \\
  const char* function(const Params&, int, Stream) {                          \\
    return "not built";                                                       \\
  }
NOT_BUILT(attention_decode<Half>, DecodeParams)
NOT_BUILT(attention_forward<Half>, AttentionParams)
NOT_BUILT(attention_forward<Bfloat16>, AttentionParams)
NOT_BUILT(attention_backward<Half>, AttentionGradientParams)
NOT_BUILT(attention_backward<Bfloat16>, AttentionGradientParams)
template <>
int backward_step_rows<Half>(int) { return 0; }
template <>
int backward_step_rows<Bfloat16>(int) { return 0; }
}  // namespace fuseformer
"""

SPLIT = Case((4, 2), 2, 64, BF16, (0, 1, 130, 900), capacity=1024)
PAGES = Case((4, 2), 2, 64, BF16, page_size=16)
BROKEN = Case((4, 2), 2, 64, BF16, page_size=16, broken_pages=True)
OPEN = Case((4, 2), 5, 64, BF16, window_right=-1)
RIGHT = Case((4, 2), 5, 64, BF16, window_right=1)
WINDOW = Case((4, 2), 3, 64, BF16, window_left=20)

# correct text, planted text, the case that must fail, and how
BUGS = {
    "no barrier before a step": (
        "    copy_async_wait<0>();\n    block_barrier();\n    if (step_begin",
        "    copy_async_wait<0>();\n    if (step_begin",
        SPLIT,
        RACE,
    ),
    "the copies of a step are not waited for": (
        "    copy_async_wait<0>();\n    block_barrier();\n    if (step_begin",
        "    copy_async_wait<1>();\n    block_barrier();\n    if (step_begin",
        SPLIT,
        INFLIGHT,
    ),
    "no barrier before tiles are overwritten": (
        "  copy_async_wait<0>();\n  block_barrier();\n  float* const tops",
        "  copy_async_wait<0>();\n  float* const tops",
        SPLIT,
        RACE,
    ),
    "no barrier before the maxima are read": (
        "  block_barrier();\n  FUSEFORMER_UNROLL\n  for (int half = 0; half < 2; ++half) {\n"
        "    const int row",
        "  FUSEFORMER_UNROLL\n  for (int half = 0; half < 2; ++half) {\n    const int row",
        SPLIT,
        RACE,
    ),
    "no barrier before the sums are read": (
        "  block_barrier();\n  for (int index = thread; index < kRows * kHeadDim / 2",
        "  for (int index = thread; index < kRows * kHeadDim / 2",
        SPLIT,
        RACE,
    ),
    "keys past the length are copied": (
        "const bool exists = step_begin + row < end;",
        "const bool exists = step_begin + row < end + 1;",
        Case((4, 2), 1, 64, BF16, (63,), capacity=100),
        NAN,
    ),
    "pages that do not exist are looked up": (
        "entry = maximum(0, minimum(entry, params.pages - 1));",
        "",
        BROKEN,
        BOUNDS,
    ),
    "the slot in a page is that of the sequence": (
        "slot = key % params.page_size;",
        "slot = key % (params.page_size / 2);",
        PAGES,
        WRONG,
    ),
    "a query sees the key after its own": (
        "if (column > last_seen[j / 2] ||",
        "if (column > last_seen[j / 2] + 1 ||",
        WINDOW,
        WRONG,
    ),
    "the window is a key too narrow": (
        "column < own_key[j / 2] - params.window_left)",
        "column <= own_key[j / 2] - params.window_left)",
        WINDOW,
        WRONG,
    ),
    "a query that sees the future sees keys past the length": (
        "minimum(own_key[1] + params.window_right, range.length - 1)",
        "own_key[1] + params.window_right",
        OPEN,
        WRONG,
    ),
    "the right side of the window is not looked at": (
        "minimum(own_key[0] + params.window_right, range.length - 1)",
        "range.length - 1",
        RIGHT,
        WRONG,
    ),
    "the first split of a window begins a step late": (
        "range.begin = first / kBlockN * kBlockN;",
        "range.begin = (first + kBlockN - 1) / kBlockN * kBlockN;",
        WINDOW,
        WRONG,
    ),
    "a warp's sums keep their own maximum": (
        "const float factor = exp2_approximate((softmax.top[0][half] - shift) * scale_log2);",
        "const float factor = exp2_approximate((softmax.top[0][half] - shift) * 0.5f);",
        SPLIT,
        WRONG,
    ),
    "the merge takes splits that nobody has written": (
        "return range.begin_of(split) < range.end_of(split); };",
        "return split < params.splits + range.size; };",
        SPLIT,
        UNINITIALISED,
    ),
    "splits are joined with equal weights": (
        "const float weight = exp2_approximate(lse[split] - shift);",
        "const float weight = 1.0f;",
        SPLIT,
        WRONG,
    ),
}


def planted(folder, correct="", wrong=""):
    """Return the kernels with a text replaced in one file, every access being checked."""
    return Kernels(build_planted(build, KERNELS, folder, FILE, correct, wrong))


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_caught(name, tmp_path):
    correct, wrong, case, how = BUGS[name]
    check_caught(how, check_decode, planted(tmp_path, correct, wrong), case)


def test_the_copy_without_a_bug_passes(tmp_path):
    """Else the tests above would pass for any reason at all."""
    kernels = planted(tmp_path)
    for case in {case for _, _, case, _ in BUGS.values()}:
        check_decode(kernels, case)
