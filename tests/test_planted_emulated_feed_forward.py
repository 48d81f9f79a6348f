"""Bugs planted in the CUDA C++ feed-forward kernels must be caught by their checks."""

import pytest
import torch
from emulated_feed_forward import Case, FeedForward, check
from emulator_build import build_feed_forward, build_planted
from emulator_units import feed_forward_unit
from planted_emulated import (
    BOUNDS,
    CONFLICTS,
    INFLIGHT,
    NAN,
    RACE,
    UNINITIALISED,
    WRONG,
    check_caught,
)

BF16 = torch.bfloat16

# One width and two activations: what is planted is compiled for each bug.
KERNELS = feed_forward_unit(
    text="""
template <>
const char* feed_forward_forward<Bfloat16>(const FeedForwardParams& params, int,
                                           Activation activation, Stream stream) {
  using Traits = FeedForwardConfig<Bfloat16, 128>;
  return activation == Activation::kRelu
             ? launch_feed_forward<Traits, Activation::kRelu>(params, stream)
             : launch_feed_forward<Traits, Activation::kGelu>(params, stream);
}
"""
)

# An odd number of steps: the last one reads where the output will be written.
PLAIN = Case(150, 128, 168, BF16)
WHOLE = Case(128, 128, 128, BF16)
BARE = Case(40, 128, 96, BF16, biases="none")
GELU = Case(100, 128, 104, BF16, "gelu")
DROPOUT = Case(100, 128, 200, BF16, dropout_p=0.2)
KERNEL, TILE = "feed_forward/forward_kernel.h", "device/tile.h"

# file, correct text, planted text, the case that must fail, and how
BUGS = {
    "no barrier before a step": (
        KERNEL,
        "    copy_async_wait<0>();\n    block_barrier();\n    const auto copy_next",
        "    copy_async_wait<0>();\n    const auto copy_next",
        PLAIN,
        RACE,
    ),
    "the copies of a step are not waited for": (
        KERNEL,
        "    copy_async_wait<0>();\n    block_barrier();\n    const auto copy_next",
        "    copy_async_wait<1>();\n    block_barrier();\n    const auto copy_next",
        PLAIN,
        INFLIGHT,
    ),
    "no barrier before tokens are read": (
        KERNEL,
        "  copy_async_wait<0>();\n  block_barrier();\n  FUSEFORMER_UNROLL\n"
        "  for (int tile = 0; tile < Warp::kRowTiles",
        "  copy_async_wait<0>();\n  FUSEFORMER_UNROLL\n  for (int tile = 0; tile < Warp::kRowTiles",
        PLAIN,
        RACE,
    ),
    "no barrier before the output is written": (
        KERNEL,
        "  copy_async_wait<0>();\n  block_barrier();\n  FUSEFORMER_UNROLL\n"
        "  for (int i = 0; i < Warp::kOutTiles",
        "  copy_async_wait<0>();\n  FUSEFORMER_UNROLL\n  for (int i = 0; i < Warp::kOutTiles",
        PLAIN,
        RACE,
    ),
    "no barrier of the warp before the output is read": (
        KERNEL,
        "  warp_barrier();\n",
        "",
        PLAIN,
        RACE,
    ),
    "copies go to the stage that is read": (
        KERNEL,
        "weights + (stage ^ 1) * Traits::kStageBytes",
        "weights + stage * Traits::kStageBytes",
        WHOLE,
        RACE,
    ),
    "weights past the last hidden unit are read": (
        KERNEL,
        "w1_copy.begin_bounded(weights, w1_rows + int64_t{last} * kW1Step, units)",
        "w1_copy.begin(weights, w1_rows + int64_t{last} * kW1Step)",
        PLAIN,
        BOUNDS,
    ),
    "columns of w2 past the last hidden unit are those of the next row": (
        KERNEL,
        "w2_copy.begin_narrow(weights + Traits::kWeightBytes, w2_rows + 2 * last * kBlockH, units)",
        "w2_copy.begin(weights + Traits::kWeightBytes, w2_rows + 2 * last * kBlockH)",
        PLAIN,
        BOUNDS,
    ),
    "a step before the first is copied": (
        KERNEL,
        "const bool more = step > 0;",
        "const bool more = true;",
        WHOLE,
        BOUNDS,
    ),
    "tokens past the last are read": (
        KERNEL,
        "x_copy.begin_bounded(tokens, x_rows, params.tokens - block_row)",
        "x_copy.begin(tokens, x_rows)",
        PLAIN,
        BOUNDS,
    ),
    "rows past the last are written": (
        KERNEL,
        "if (block_row + row < params.tokens) {",
        "if (true) {",
        PLAIN,
        BOUNDS,
    ),
    "b1 past the last hidden unit is read": (
        KERNEL,
        "params.b1 != nullptr && 8 * thread < units",
        "params.b1 != nullptr",
        PLAIN,
        BOUNDS,
    ),
    "the second stage of a b1 that is not given is not cleared": (
        KERNEL,
        "      copy_async_16_or_zero(biases + Traits::kBiasBytes + 16 * thread, b1, false);\n",
        "",
        BARE,
        UNINITIALISED,
    ),
    "half of b1 is copied": (
        KERNEL,
        "more && b1 != nullptr && thread < kBlockH / 8",
        "more && b1 != nullptr && thread < kBlockH / 16",
        PLAIN,
        WRONG,
    ),
    "the output does not begin at 0": (
        KERNEL,
        "warp.out[tile][i][j] = 0.0f;",
        "(void)j;",
        PLAIN,
        NAN,
    ),
    "tiles are not swizzled": (
        TILE,
        "return kWhole ? row & 7 : row >> 1 & 3;",
        "return row & 0;",
        PLAIN,
        CONFLICTS,
    ),
    "copies are swizzled otherwise than loads": (
        TILE,
        "target = Layout::offset(row, thread % kAcross);",
        "target = Layout::offset(row, thread % kAcross) ^ 16;",
        PLAIN,
        WRONG,
    ),
    "rows are swizzled by fewer bits": (
        TILE,
        "return kWhole ? row & 7 : row >> 1 & 3;",
        "return kWhole ? row & 3 : row >> 1 & 3;",
        PLAIN,
        CONFLICTS,
    ),
    "w2 is taken for its transpose": (
        KERNEL,
        "ldmatrix_x4(b, w2_addresses.at(pair, step))",
        "ldmatrix_x4_transposed(b, w2_addresses.at(pair, step))",
        PLAIN,
        WRONG,
    ),
    "b1 is added behind the activation": (
        KERNEL,
        "exists ? activate<kActivation>(value) : 0.0f",
        "exists ? activate<kActivation>(hidden[tile][i][j]) + b1_values[j % 2] : 0.0f * value",
        PLAIN,
        WRONG,
    ),
    "b2 is scaled with the output": (
        KERNEL,
        "out[0] * factor + b2[0], out[1] * factor + b2[1]",
        "(out[0] + b2[0]) * factor, (out[1] + b2[1]) * factor",
        DROPOUT,
        WRONG,
    ),
    "dropout takes the words of the next hidden units": (
        "feed_forward/dropout.h",
        "row + 16 * tile, unit + 32 * patch + j",
        "row + 16 * tile, unit + 32 * patch + 32 + j",
        DROPOUT,
        WRONG,
    ),
    "gelu has the tail of the other side": (
        "feed_forward/activation.h",
        "maximum_or_nan(x, 0.0f) - z",
        "maximum_or_nan(x, 0.0f) + z",
        GELU,
        WRONG,
    ),
}


def planted(folder, file=KERNEL, correct="", wrong=""):
    """Return the kernels with a text replaced in one file, every access being checked."""
    return FeedForward(build_planted(build_feed_forward, KERNELS, folder, file, correct, wrong))


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_caught(name, tmp_path):
    file, correct, wrong, case, how = BUGS[name]
    check_caught(how, check, planted(tmp_path, file, correct, wrong), case)


def test_the_copy_without_a_bug_passes(tmp_path):
    """Else the tests above would pass for any reason at all."""
    kernels = planted(tmp_path)
    for case in (PLAIN, WHOLE, BARE, GELU, DROPOUT):
        check(kernels, case)
