"""Bugs planted in the CUDA C++ kernels of gated blocks must be caught by their checks."""

import pytest
import torch
from emulated import Kernels
from emulator_build import build_feed_forward, build_planted
from emulator_units import feed_forward_unit
from gated_checks import GatedCase as Case
from gated_checks import check_gated
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

KERNELS = feed_forward_unit("gated_activation", "gated_gradient")
LINEAR, GRADIENT = "feed_forward/linear_kernel.h", "feed_forward/gated_gradient_kernel.h"
TRAITS = "feed_forward/linear_traits.h"
WIDE = Case((130, 136, 264, 40), "gelu", BF16, 0.1)
WHOLE = Case((128, 192, 128, 40), "silu", BF16)
BUGS = {
    "no barrier before a step": (
        LINEAR,
        "      copy_async_wait<0>();\n      block_barrier();\n",
        "      copy_async_wait<0>();\n",
        WHOLE,
        RACE,
    ),
    "the copies of a step are not waited for": (
        LINEAR,
        "      copy_async_wait<0>();\n      block_barrier();\n",
        "      copy_async_wait<1>();\n      block_barrier();\n",
        WHOLE,
        INFLIGHT,
    ),
    "the strips of the second matrix are those of the first": (
        LINEAR,
        "kGated && strip % 2 == 1 ? up_rows : w_rows",
        "kGated && strip % 2 == 2 ? up_rows : w_rows",
        WHOLE,
        WRONG,
    ),
    "both matrices take the units in another order": (
        LINEAR,
        "const int unit = strip / Traits::kMatrices * kStripRows;",
        "const int unit = (Traits::kStrips - 1 - strip) / Traits::kMatrices * kStripRows;",
        WHOLE,
        WRONG,
    ),
    "units past the last are copied": (
        LINEAR,
        "params.hidden - block_unit - unit,",
        "params.hidden - block_unit,",
        WIDE,
        BOUNDS,
    ),
    "columns past the last are copied": (
        "device/tile.h",
        "rows && 8 * (chunk + first_chunk) < columns;",
        "rows && 8 * (chunk + first_chunk) <= columns;",
        WIDE,
        BOUNDS,
    ),
    "a block has the units of two": (
        LINEAR,
        "block_unit + kUnits <= params.hidden &&",
        "block_unit + kUnits <= 2 * params.hidden &&",
        Case((128, 128, 72, 8), "relu", BF16),
        BOUNDS,
    ),
    "the gate is its own other": (
        LINEAR,
        "hidden[tile][i][j] *= sums[tile][kUnitTiles + i][j];",
        "hidden[tile][i][j] *= sums[tile][i][j];",
        WHOLE,
        WRONG,
    ),
    "the second product is not kept": (
        LINEAR,
        "    if constexpr (kGated) write(params.up, sums, kUnitTiles);\n",
        "",
        WHOLE,
        UNINITIALISED,
    ),
    "the second product is kept for the first": (
        LINEAR,
        "write(params.up, sums, kUnitTiles);",
        "write(params.up, sums, 0);",
        WHOLE,
        WRONG,
    ),
    "no barrier before a tile lies where another did": (
        LINEAR,
        "const auto& values, int first) {\n    block_barrier();",
        "const auto& values, int first) {",
        WHOLE,
        RACE,
    ),
    "no barrier before a tile is read": (
        LINEAR,
        "    block_barrier();\n    for (int index = thread; index < kBlockM",
        "    for (int index = thread; index < kBlockM",
        WHOLE,
        RACE,
    ),
    "operands of two products are exchanged": (
        LINEAR,
        "a[tile], b[2], b[3]);",
        "a[tile], b[3], b[2]);",
        WHOLE,
        WRONG,
    ),
    "dropout is not scaled": (
        LINEAR,
        "hidden[tile][i][j] *= params.dropout_scale;",
        "hidden[tile][i][j] *= 1.0f;",
        WIDE,
        WRONG,
    ),
    "no barrier before the kept units are read": (
        GRADIENT,
        "    warp_barrier();\n",
        "",
        WIDE,
        RACE,
    ),
    "a warp has the kept units of another": (
        GRADIENT,
        "+ 16 * kWords * warp;",
        "+ 16 * kWords * (warp / 2);",
        WIDE,
        RACE,
    ),
    "the kept units are those of the row below": (
        GRADIENT,
        "first_row + row,\n                    first_unit",
        "first_row + row + 1,\n                    first_unit",
        WIDE,
        WRONG,
    ),
    "both rows of a word have the units of the first": (
        GRADIENT,
        "kept[(row + 8) * kWords + word] = bits[1];",
        "kept[(row + 8) * kWords + word] = bits[0];",
        WIDE,
        WRONG,
    ),
    "kept units are taken from the wrong eight": (
        GRADIENT,
        ">> (chunk % 4 * 8)",
        ">> (chunk % 2 * 8)",
        WIDE,
        WRONG,
    ),
    "the gradient of the gate is not dropped": (
        GRADIENT,
        "gradient = keep ? gradient * params.dropout_scale : 0.0f;",
        "gradient = gradient * params.dropout_scale;",
        WIDE,
        WRONG,
    ),
    "units past the last have a gradient": (
        GRADIENT,
        "  if (unit >= params.hidden) return;\n",
        "",
        WIDE,
        RACE,
    ),
    "rows past the last have a gradient": (
        GRADIENT,
        "row < 16 && first_row + row < params.tokens;",
        "row < 16;",
        WIDE,
        BOUNDS,
    ),
    "the last rows of a warp have none": (
        GRADIENT,
        "row < 16 && first_row",
        "row < 14 && first_row",
        WHOLE,
        NAN,
    ),
    "the gradient of the gate lacks the slope": (
        GRADIENT,
        "gradient * other * slope;",
        "gradient * other;",
        WHOLE,
        WRONG,
    ),
    "the gradients are exchanged": (
        GRADIENT,
        "dup[j] = gradient * gated;",
        "dup[j] = gradient * other;",
        WHOLE,
        WRONG,
    ),
}


def planted(folder, file=LINEAR, correct="", wrong=""):
    """Return the kernels with a text replaced in one file, every access being checked."""
    return Kernels(build_planted(build_feed_forward, KERNELS, folder, file, correct, wrong))


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_caught(name, tmp_path):
    file, correct, wrong, case, how = BUGS[name]
    check_caught(how, check_gated, planted(tmp_path, file, correct, wrong), case)


def test_the_copy_without_a_bug_passes(tmp_path):
    """Else the tests above would pass for any reason at all."""
    kernels = planted(tmp_path)
    for case in {case for _, _, _, case, _ in BUGS.values()}:
        check_gated(kernels, case)
