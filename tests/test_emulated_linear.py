"""Feed-forward in the epilogue regime by CUDA C++ kernels, executed on the CPU from what ships."""

from types import SimpleNamespace

import pytest
import torch
from block_checks import FeedForwardCase as Case
from block_checks import check_feed_forward, check_feed_forward_dropout
from emulated import Kernels
from emulator_build import build_feed_forward, build_planted
from emulator_units import feed_forward_unit
from planted_emulated import (
    BOUNDS,
    INFLIGHT,
    RACE,
    UNINITIALISED,
    WRONG,
    check_caught,
)

import fuseformer as ff

BF16, FP16 = torch.bfloat16, torch.float16


@pytest.fixture(scope="module")
def plain():
    return Kernels(build_feed_forward("plain"))


@pytest.fixture(scope="module")
def shadow():
    return Kernels(build_feed_forward("shadow"))


CASES = [
    Case((1, 40, 72, 40), "relu", BF16),
    Case((49, 8, 136, 24), "relu", BF16, 0.3, biases=False),
    Case((63, 40, 104, 40), "relu", FP16, 0.3),
    Case((33, 320, 96, 320), "gelu", BF16, 0.5),
    Case((17, 320, 96, 320), "gelu", FP16, biases=False),
    Case((130, 24, 40, 8), "gelu_tanh", BF16),
    Case((19, 40, 128, 40), "gelu_tanh", FP16, 0.1, biases=False),
    Case((31, 40, 72, 264), "silu", BF16, 0.2),
    Case((63, 96, 104, 96), "silu", FP16, biases=False),
    Case((300, 64, 520, 40), "gelu", BF16, 0.1),
    Case((128, 128, 256, 64), "silu", FP16, 0.1),
    Case((1100, 72, 264, 8), "relu", BF16),
    # One kernel for both products forward, whose backward pass begins with the first.
    Case((70, 64, 136, 64), "gelu", FP16, 0.2),
    Case((33, 256, 40, 256), "silu", BF16, biases=False),
]


@pytest.mark.parametrize("rounding", ["exact", "chained", "truncating"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_the_oracle(case, rounding, plain):
    plain.emulator.set_options(False, 1, "late", rounding, 80)
    check_feed_forward(plain, case)


@pytest.mark.parametrize("landing", ["late", "early", "random"])
@pytest.mark.parametrize("case", CASES[3:6] + CASES[9:11], ids=str)
def test_no_access_is_wrong_in_any_order(case, landing, shadow):
    shadow.emulator.set_options(True, 2, landing, "exact", 86)
    check_feed_forward(shadow, case)


@pytest.mark.parametrize(("size", "dropout_p"), [(40, 0.1), (72, 0.75)])
def test_dropout_decides_as_defined_both_ways(size, dropout_p, plain):
    plain.emulator.set_options(False, 1, "late", "exact", 80)
    check_feed_forward_dropout(plain, size, dropout_p)


def test_the_product_has_no_bank_conflict(shadow):
    shadow.emulator.set_options(False, 1, "late", "exact", 80)
    counts = []
    for width in (64, 640):
        x, w = torch.randn(128, width).to(BF16), torch.randn(256, width).to(BF16)
        act = torch.empty(128, 256, dtype=BF16)
        shadow.ops.linear_activation(x, w, None, act, None, None, "relu", 0, 1.0)
        counts.append(shadow.ops.counters)
    assert counts[1]["ldmatrix"] == 10 * counts[0]["ldmatrix"]
    assert [c["ldmatrix_conflicts"] for c in counts] == [0, 0]
    assert [c["shared_conflicts"] for c in counts] == [0, 0]


def test_values_that_are_not_finite_stay_where_they_are(plain):
    """An infinite token makes its own row so, as in PyTorch, and no other."""
    x, w1 = torch.randn(20, 16).to(FP16), torch.randn(24, 16).to(FP16)
    x[2, 3], x[4, 0] = torch.inf, torch.nan
    w2 = torch.randn(16, 24).to(FP16)
    others = [row for row in range(20) if row not in (2, 4)]
    for activation in ("relu", "gelu", "gelu_tanh", "silu"):
        y, pre = plain.feed_forward_forward(x, w1, None, w2, None, None, activation, 0.0)
        assert pre[others].isfinite().all()
        assert y[others].isfinite().all()
        assert not pre[2].isfinite().any()
        assert y[4].isnan().all()


def test_a_product_that_was_not_saved_is_computed_again(plain):
    plain.emulator.set_options(False, 1, "late", "exact", 80)

    def forward(*arguments):
        y, pre = plain.feed_forward_forward(*arguments, False)
        assert pre.shape == (0,)
        return y, pre

    unsaved = SimpleNamespace(
        feed_forward_forward=forward, feed_forward_backward=plain.feed_forward_backward
    )
    for tokens in (9, 40):
        check_feed_forward(unsaved, Case((tokens, 40, 72, 40), "silu", BF16, 0.2))


def test_no_columns_leave_the_bias(shadow):
    x, w, bias = (torch.ones(*s, dtype=BF16) for s in ((128, 0), (256, 0), (256,)))
    act = torch.empty(128, 256, dtype=BF16)
    shadow.ops.linear_activation(x, w, bias, act, None, None, "relu", 0, 1.0)
    assert (act == 1).all()


def test_the_public_op(plain):
    torch.manual_seed(0)
    x, w1, w2 = (torch.randn(*s).to(BF16) for s in ((3, 7, 16), (24, 16), (16, 24)))
    with plain.installed(), ff.explain() as decisions:
        leaves = [t.requires_grad_() for t in (x, w1, w2)]
        y = ff.feed_forward(x, w1, None, w2, None, activation="silu", backend="cuda")
        gradients = torch.autograd.grad(y.float().sum(), leaves)
    assert decisions.decisions[0].backend == "cuda"
    assert [g.shape for g in gradients] == [t.shape for t in leaves]
    with plain.installed(), pytest.raises(ValueError, match="multiples of 8, not 12 and 24"):
        ff.feed_forward(
            x[..., :12].detach(), w1[:, :12].detach(), None, w2.detach(), None, backend="cuda"
        )


@pytest.mark.parametrize(
    ("place", "wrong", "said"),
    [
        (0, torch.zeros(4, 12, dtype=BF16), "x: got 12 columns, expected a multiple of 8"),
        (1, torch.zeros(24, 8, dtype=BF16), r"w: got shape \(24, 8\), expected \(24, 16\)"),
        (1, torch.zeros(24, 16, dtype=FP16), "w: got float16, expected bfloat16"),
        (2, torch.zeros(16, dtype=BF16), r"bias: got shape \(16,\), expected \(24,\)"),
        (3, torch.zeros(4, 16, dtype=BF16), r"act: got shape \(4, 16\), expected \(4, 24\)"),
        (5, torch.zeros(1), "seed: got float32, expected int64"),
        (6, "tanh", "activation: got 'tanh', expected relu"),
    ],
)
def test_the_compiled_op_names_what_is_wrong(place, wrong, said, plain):
    x, w = torch.zeros(4, 16, dtype=BF16), torch.zeros(24, 16, dtype=BF16)
    given = [x, w, None, torch.zeros(4, 24, dtype=BF16), None, None, "relu", 0, 1.0]
    given[place] = wrong
    with pytest.raises(ValueError, match=said):
        plain.ops.linear_activation(*given)


# ------------------------------------------------------------------------------------------------
# Planted bugs
# ------------------------------------------------------------------------------------------------

KERNELS = feed_forward_unit("linear_activation", "activation_gradient")
LINEAR, GRADIENT = "feed_forward/linear_kernel.h", "feed_forward/gradient_kernel.h"
ACTIVATION, TILE = "feed_forward/activation.h", "device/tile.h"
WIDE = Case((130, 136, 264, 40), "gelu", BF16, 0.1)
WHOLE = Case((128, 192, 256, 40), "silu", BF16)
TANH = Case((40, 24, 40, 8), "gelu_tanh", BF16, 0.2)
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
        "      block_barrier();\n",
        WHOLE,
        INFLIGHT,
    ),
    "no barrier before the output lies where tiles were": (
        LINEAR,
        "const auto& values, int first) {\n    block_barrier();",
        "const auto& values, int first) {",
        WIDE,
        RACE,
    ),
    "no barrier before the output is read": (
        LINEAR,
        "    block_barrier();\n    for (int index = thread; index < kBlockM",
        "    for (int index = thread; index < kBlockM",
        WIDE,
        RACE,
    ),
    "rows that do not exist are copied": (
        TILE,
        "const bool exists = row + pass * kRowsAtOnce < rows && 8",
        "const bool exists = row + pass * kRowsAtOnce <= rows && 8",
        WIDE,
        BOUNDS,
    ),
    "columns that do not exist are copied": (
        TILE,
        "rows && 8 * (chunk + first_chunk) < columns;",
        "rows && 8 * (chunk + first_chunk) <= columns;",
        WIDE,
        BOUNDS,
    ),
    "units that do not exist are written": (
        LINEAR,
        " && block_unit + 8 * chunk < params.hidden) {",
        ") {",
        WIDE,
        RACE,
    ),
    "the edge is taken for whole": (
        LINEAR,
        "params.width % Traits::kBlockK == 0",
        "true",
        Case((128, 136, 256, 40), "relu", BF16),
        BOUNDS,
    ),
    "operands of two products are exchanged": (
        LINEAR,
        "a[tile], b[2], b[3]);",
        "a[tile], b[3], b[2]);",
        WHOLE,
        WRONG,
    ),
    "the product is not kept for the backward pass": (
        LINEAR,
        "params.pre.data != nullptr",
        "params.pre.data == nullptr",
        WHOLE,
        UNINITIALISED,
    ),
    "dropout is not scaled": (
        LINEAR,
        "hidden[tile][i][j] *= params.dropout_scale;",
        "hidden[tile][i][j] *= 1.0f;",
        TANH,
        WRONG,
    ),
    "the mask of the gradient is another": (
        GRADIENT,
        "is_kept(word, half,",
        "is_kept(word, 1 - half,",
        TANH,
        WRONG,
    ),
    "the slope lacks its inner derivative": (
        ACTIVATION,
        "0.134145f * square",
        "0.044715f * square",
        TANH,
        WRONG,
    ),
    "no barrier before the sums of the bias": (
        GRADIENT,
        "  block_barrier();\n",
        "",
        WHOLE,
        RACE,
    ),
    "the last line of sums is left out": (
        GRADIENT,
        "other < kGradientLines; ++other",
        "other < kGradientLines - 1; ++other",
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
    check_caught(how, check_feed_forward, planted(tmp_path, file, correct, wrong), case)


def test_the_copy_without_a_bug_passes(tmp_path):
    """Else the tests above would pass for any reason at all."""
    kernels = planted(tmp_path)
    for case in {case for _, _, _, case, _ in BUGS.values()}:
        check_feed_forward(kernels, case)
