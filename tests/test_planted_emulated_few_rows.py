"""Bugs planted in the CUDA C++ kernels of few tokens must be caught by their checks."""

import pytest
import torch
from block_checks import FeedForwardCase, check_feed_forward
from emulated import Kernels
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

from fuseformer import reference
from fuseformer.testing import assert_close_to_reference

BF16 = torch.bfloat16


def check(kernels, case):
    check_feed_forward(kernels, case)
    assert kernels.counters["ldmatrix_conflicts"] == 0


KERNELS = feed_forward_unit("few_rows_hidden", "few_rows_output", "activation_gradient")
FEW, LAUNCH = "feed_forward/few_rows_kernel.h", "feed_forward/few_rows_launch.h"
# Two parts of the hidden dimension, more steps than stages, and tails everywhere.
WIDE = FeedForwardCase((11, 1032, 1096, 40), "gelu", BF16)
DROPPED = FeedForwardCase((11, 40, 136, 40), "silu", BF16, 0.3)
WHOLE = FeedForwardCase((16, 1024, 64, 32), "relu", BF16)
BUGS = {
    "a stage is not waited for": (
        FEW,
        "copy_async_wait<Traits::kStages - 2>();",
        "copy_async_wait<Traits::kStages - 1>();",
        WHOLE,
        INFLIGHT,
    ),
    "copies go to the stage that is read": (
        FEW,
        "stage == 0 ? kAllStages - Traits::kStageBytes : stage - Traits::kStageBytes;",
        "stage;",
        WHOLE,
        INFLIGHT,
    ),
    "no group where there is no chunk": (
        FEW,
        "    }\n    copy_async_commit();",
        "      copy_async_commit();\n    }",
        WIDE,
        INFLIGHT,
    ),
    "no barrier before sums lie where stages were": (
        FEW,
        "  copy_async_wait<0>();\n  block_barrier();\n",
        "  copy_async_wait<0>();\n",
        WHOLE,
        RACE,
    ),
    "no barrier before sums are read": (
        FEW,
        "  block_barrier();\n}\n\n// The sums that all warps have",
        "}\n\n// The sums that all warps have",
        WHOLE,
        RACE,
    ),
    "a warp's sums are left out": (
        FEW,
        "warp < Traits::kWarps; ++warp",
        "warp < Traits::kWarps - 1; ++warp",
        WHOLE,
        WRONG,
    ),
    "a part is left out of the sum": (
        FEW,
        "split < params.splits; ++split",
        "split < params.splits - 1; ++split",
        WIDE,
        WRONG,
    ),
    "parts overlap": (
        FEW,
        "minimum(begin + params.split_columns, params.columns)",
        "params.columns",
        WIDE,
        WRONG,
    ),
    "the parts are not added up": (
        LAUNCH,
        "failure != nullptr || params.partial == nullptr",
        "failure != nullptr || params.partial != nullptr",
        WIDE,
        NAN,
    ),
    "columns past the last are read": (
        FEW,
        "const bool exists = column < end;",
        "const bool exists = column <= end;",
        DROPPED,
        BOUNDS,
    ),
    "units past the last are read": (
        FEW,
        "w_exists[tile] = unit < params.units;",
        "w_exists[tile] = unit <= params.units;",
        DROPPED,
        BOUNDS,
    ),
    "tokens past the last are read": (
        FEW,
        "x_exists[half] = row < params.tokens;",
        "x_exists[half] = true;",
        DROPPED,
        BOUNDS,
    ),
    "tokens past the last are written": (
        FEW,
        "row < params.tokens && block_unit + column",
        "block_unit + column",
        DROPPED,
        BOUNDS,
    ),
    "units past the last are written": (
        FEW,
        "row < params.tokens && block_unit + column < params.units",
        "row < params.tokens && block_unit + column <= params.units",
        DROPPED,
        RACE,
    ),
    "the sum has tokens past the last": (
        FEW,
        "  if (row >= params.tokens) return;\n",
        "",
        WIDE,
        BOUNDS,
    ),
    "halves of the tokens are exchanged": (
        FEW,
        "{low.words[i], high.words[i], low.words[i + 1], high.words[i + 1]}",
        "{high.words[i], low.words[i], high.words[i + 1], low.words[i + 1]}",
        WHOLE,
        WRONG,
    ),
    "operands have their columns in different orders": (
        FEW,
        "b.words[i], b.words[i + 1]);",
        "b.words[i / 2], b.words[i / 2 + 2]);",
        WHOLE,
        WRONG,
    ),
    "the product is not kept for the backward pass": (
        FEW,
        "if (params.pre.data != nullptr) write_pair",
        "if (params.pre.data == nullptr) write_pair",
        DROPPED,
        UNINITIALISED,
    ),
    "dropout is not scaled": (
        FEW,
        "value = keeps ? value * params.dropout_scale : 0.0f;",
        "value = keeps ? value : 0.0f;",
        DROPPED,
        WRONG,
    ),
    "both units of a pair are kept together": (
        FEW,
        "row, unit + j, params.dropout_threshold",
        "row, unit + 0 * j, params.dropout_threshold",
        DROPPED,
        WRONG,
    ),
    "the mask is that of other units": (
        "feed_forward/dropout.h",
        "unit & 16 ? words[2] : words[0]",
        "unit & 16 ? words[0] : words[2]",
        DROPPED,
        WRONG,
    ),
    "the bias is that of the first units": (
        FEW,
        "static_cast<const Element*>(bias) + unit)",
        "static_cast<const Element*>(bias) + unit % 32)",
        DROPPED,
        WRONG,
    ),
}
GATED_BUGS = {
    "both matrices are the first": (
        "8 * tile < kUnits ? params.w : params.w_up;",
        "8 * tile < 2 * kUnits ? params.w : params.w_up;",
    ),
    "the gate is its own other": (
        "sum_of_warps<Traits>(row, Traits::kUnits + column)",
        "sum_of_warps<Traits>(row, column)",
    ),
    "the second product is not multiplied by": ("act.high *= up.high;", ""),
}


def planted(folder, file=FEW, correct="", wrong=""):
    """Return the kernels with a text replaced in one file, every access being checked."""
    return Kernels(build_planted(build_feed_forward, KERNELS, folder, file, correct, wrong))


def check_gated_forward(kernels):
    """The forward pass alone: gated cases have another gradient kernel."""
    x, gate, up, down = (
        torch.randn(*s).to(BF16) for s in ((11, 40), (136, 40), (136, 40), (40, 136))
    )
    y, *_ = kernels.gated_feed_forward_forward(x, gate, up, down, None, "silu", 0.0)
    options = {"activation": "silu", "dropout_p": 0.0}
    low = reference.gated_feed_forward(x, gate, up, down, **options)
    exact = reference.gated_feed_forward(*(t.double() for t in (x, gate, up, down)), **options)
    assert_close_to_reference(y, exact, low)


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_caught(name, tmp_path):
    file, correct, wrong, case, how = BUGS[name]
    check_caught(how, check, planted(tmp_path, file, correct, wrong), case)


@pytest.mark.parametrize("name", GATED_BUGS)
def test_a_planted_bug_of_a_gated_block_is_caught(name, tmp_path):
    kernels = planted(tmp_path, FEW, *GATED_BUGS[name])
    with pytest.raises(AssertionError, match=WRONG):
        check_gated_forward(kernels)


def test_the_copy_without_a_bug_passes(tmp_path):
    """Else the tests above would pass for any reason at all."""
    kernels = planted(tmp_path)
    for case in {case for _, _, _, case, _ in BUGS.values()}:
        check(kernels, case)
    check_gated_forward(kernels)
