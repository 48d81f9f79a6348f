"""Bugs planted in the CUDA C++ feed-forward backward kernel must be caught by its checks."""

import pytest
import torch
from emulated_feed_forward import Backward, Case, check_backward, check_infinite_gradient
from emulator_build import build_feed_forward, build_planted
from emulator_units import feed_forward_unit
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

# Two stages of tokens and one, one activation and a choice: what is planted is compiled each time.
KERNELS = feed_forward_unit(
    text="""
template <>
const char* feed_forward_backward<Bfloat16>(const FeedForwardGradientParams& given, int width,
                                            Stream stream) {
  if (width == 256) {
    using Traits = FeedForwardBackwardConfig<Bfloat16, 256>;
    return launch_feed_forward_backward<Traits, SmoothActivation>(given, stream);
  }
  using Traits = FeedForwardBackwardConfig<Bfloat16, 128>;
  return launch_feed_forward_backward<Traits, ActivationConstant<Activation::kRelu>>(given, stream);
}
"""
)

# Two blocks of units, the last one ragged, and two splits with two steps each.
PLAIN = (Case(200, 128, 200, BF16), 2)
WHOLE = (Case(128, 128, 128, BF16), 1)
DROPOUT = (Case(100, 128, 200, BF16, dropout_p=0.2), 1)
WIDE = (Case(130, 256, 104, BF16, "silu"), 1)
KERNEL, WARP = "feed_forward/backward_kernel.h", "feed_forward/backward_warp.h"
FINISH = "feed_forward/backward_finish.h"
TURN = "does not come"
PASS = (
    "    if (thread_again<kThreads>() == 0 && step + 1 < steps_end())\n"
    "      pass_turn(given.turns + dx_step(step + 1));\n"
)

# file, correct text, planted text, the case that must fail, and how
BUGS = {
    "no barrier before a step": (
        KERNEL,
        "    copy_async_wait<0>();\n    block_barrier();\n",
        "    copy_async_wait<0>();\n",
        PLAIN,
        RACE,
    ),
    "the copies of a step are not waited for": (
        KERNEL,
        "    copy_async_wait<0>();\n    block_barrier();\n",
        "    copy_async_wait<1>();\n    block_barrier();\n",
        PLAIN,
        INFLIGHT,
    ),
    "no barrier before the hidden tile is read": (
        KERNEL,
        "    block_barrier();\n    warp.add_to_weights(stage);",
        "    warp.add_to_weights(stage);",
        PLAIN,
        RACE,
    ),
    "no barrier before the only tile of tokens is overwritten": (
        KERNEL,
        "    block_barrier();\n    if constexpr (Traits::kStages == 2) {\n      stage",
        "    if constexpr (Traits::kStages == 2) {\n      stage",
        WIDE,
        RACE,
    ),
    "copies go to the stage that is read": (
        KERNEL,
        "begin_next(step, Traits::kTokenBytes - stage)",
        "begin_next(step, stage)",
        PLAIN,
        RACE,
    ),
    "products read the stage of the last step": (
        KERNEL,
        "stage = Traits::kTokenBytes - stage;",
        "(void)stage;",
        PLAIN,
        WRONG,
    ),
    "a step before the first is copied": (
        KERNEL,
        "const bool more = step > first;",
        "const bool more = true;",
        WHOLE,
        BOUNDS,
    ),
    "tokens past the last are read": (
        KERNEL,
        ".begin_bounded(token_tile, rows_of(params.x, end - 1), tokens)",
        ".begin(token_tile, rows_of(params.x, end - 1 + 0 * tokens))",
        PLAIN,
        BOUNDS,
    ),
    "rows of dy past the last are read": (
        KERNEL,
        ".begin_bounded(dy_tile, rows_of(given.dy, end - 1), tokens)",
        ".begin(dy_tile, rows_of(given.dy, end - 1))",
        PLAIN,
        BOUNDS,
    ),
    "rows of w1 past the last unit are read": (
        KERNEL,
        "int64_t{2} * block_unit * kWidth, units);",
        "int64_t{2} * block_unit * kWidth, units + 8);",
        PLAIN,
        BOUNDS,
    ),
    "columns of w2 past the last unit are those of the next row": (
        KERNEL,
        "static_cast<const char*>(params.w2.data) + 2 * block_unit, units);",
        "static_cast<const char*>(params.w2.data) + 2 * block_unit, units + 8);",
        PLAIN,
        BOUNDS,
    ),
    "b1 past the last unit is read": (
        KERNEL,
        "params.b1 != nullptr && unit < units;",
        "params.b1 != nullptr && unit <= units;",
        PLAIN,
        BOUNDS,
    ),
    "sums of units past the last are written": (
        WARP,
        "if (unit >= units) continue;",
        "if (unit > units) continue;",
        PLAIN,
        RACE,
    ),
    "rows of dx past the last are written": (
        FINISH,
        "if (token >= given.forward.tokens) continue;",
        "",
        PLAIN,
        BOUNDS,
    ),
    "the weight gradients do not begin at 0": (
        WARP,
        "dweight[tile][i][j] = 0.0f;",
        "(void)j;",
        PLAIN,
        NAN,
    ),
    "the sums of the bias do not begin at 0": (
        KERNEL,
        "biases[kBlockH + i] = 0.0f;",
        "(void)biases;",
        PLAIN,
        UNINITIALISED,
    ),
    "every lane adds to the sums of the bias": (
        WARP,
        "if (threadIdx.x % 4 == 0) {",
        "if (true) {",
        PLAIN,
        RACE,
    ),
    "the sums of the bias lack a step": (
        WARP,
        "*bias_sum(tile, 0) += dbias[tile][0];",
        "*bias_sum(tile, 0) = dbias[tile][0];",
        PLAIN,
        WRONG,
    ),
    "tiles of the weight gradients are written in another order": (
        WARP,
        "row + 16 * (tile ^ Warp::first_tile(place))",
        "row + 16 * (tile + 0 * Warp::first_tile(place))",
        WHOLE,
        RACE,
    ),
    "operands of two products are exchanged": (
        WARP,
        "a[tile], b[2], b[3]);",
        "a[tile], b[3], b[2]);",
        PLAIN,
        WRONG,
    ),
    "w2 is taken for its transpose": (
        WARP,
        "ldmatrix_x4_transposed(b, w2_rows.at(step, pair));",
        "ldmatrix_x4(b, w2_rows.at(step, pair));",
        PLAIN,
        WRONG,
    ),
    "hidden units are stored where the swizzle does not look": (
        KERNEL,
        "(stored ^ 16 * i)",
        "(stored + 16 * i)",
        WHOLE,
        RACE,
    ),
    "the slope is left out": (
        KERNEL,
        "gradient[j] *= hidden[row_tile][i][j];",
        "(void)row_tile;",
        WIDE,
        WRONG,
    ),
    "dx is added by the columns of another warp": (
        WARP,
        "shared, lane, index / Traits::kDxRowWarps * Traits::kDxColumnTiles / 2);",
        "shared, lane);",
        PLAIN,
        WRONG,
    ),
    "dx is added without an order": (
        KERNEL,
        "    if (thread == 0) wait_for_turn(",
        "    if (false) wait_for_turn(",
        PLAIN,
        "not waited for",
    ),
    "a turn is passed on ahead of the barrier behind its sums": (
        KERNEL,
        f"    block_barrier();\n{PASS}",
        f"{PASS}    block_barrier();\n",
        PLAIN,
        "before all sums are added",
    ),
    "parts of dx are taken for one": (
        FINISH,
        "part < given.dx_parts",
        "part < 1",
        PLAIN,
        WRONG,
    ),
    "blocks of a part take turns as those of one sum do": (
        KERNEL,
        "order[1] = block / given.dx_parts;",
        "order[1] = block;",
        PLAIN,
        TURN,
    ),
    "a turn is passed twice": (
        KERNEL,
        "if (thread_again<kThreads>() == 0 && step + 1 < steps_end())",
        "if (thread_again<kThreads>() < 2 && step + 1 < steps_end())",
        PLAIN,
        "not waited for",
    ),
    "the last turn is not passed on": (
        KERNEL,
        "if (thread == 0 && static_cast<int>(last_step) < steps_end())",
        "if (false)",
        PLAIN,
        "ends without passing on its turn",
    ),
    "dropout decides for the units of the next thirty-two": (
        "feed_forward/dropout.h",
        "unit + 32 * patch + j",
        "unit + 32 * patch + 32 + j",
        DROPOUT,
        WRONG,
    ),
    "the gradient goes back through units that were dropped": (
        KERNEL,
        "values[j] = slope = 0.0f;",
        "values[j] = 0.0f;",
        DROPOUT,
        WRONG,
    ),
    "the weight gradients lack dropout's factor": (
        FINISH,
        "pack<Element>(sums[2 * i] * factor, sums[2 * i + 1] * factor)",
        "pack<Element>(sums[2 * i], sums[2 * i + 1 + 0 * (factor > 0)])",
        DROPOUT,
        WRONG,
    ),
    "dx lacks dropout's factor": (
        FINISH,
        "pack<Element>(first * factor, second * factor)",
        "pack<Element>(first, second + 0 * factor)",
        DROPOUT,
        WRONG,
    ),
    "the last split is left out": (
        FINISH,
        "split < splits; ++split",
        "split < splits - 1; ++split",
        PLAIN,
        WRONG,
    ),
}


def planted(folder, file=KERNEL, correct="", wrong=""):
    """Return the kernels with a text replaced in one file, every access being checked."""
    return Backward(build_planted(build_feed_forward, KERNELS, folder, file, correct, wrong))


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_caught(name, tmp_path):
    file, correct, wrong, case, how = BUGS[name]
    check_caught(how, check_backward, planted(tmp_path, file, correct, wrong), *case)


def test_units_that_do_not_exist_are_found_in_what_is_not_finite(tmp_path):
    kernels = planted(tmp_path, KERNEL, "8 * i < warp_units ? packed : 0", "packed")
    with pytest.raises(AssertionError, match="dx"):
        check_infinite_gradient(kernels, 128)


def test_the_copy_without_a_bug_passes(tmp_path):
    """Else the tests above would pass for any reason at all."""
    kernels = planted(tmp_path)
    for case in (PLAIN, WHOLE, DROPOUT, WIDE):
        check_backward(kernels, *case)
    check_infinite_gradient(kernels, 128)
