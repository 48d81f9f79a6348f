"""Gated feed-forward by CUDA C++ kernels, executed on the CPU from the source that ships."""

from types import SimpleNamespace

import pytest
import torch
from emulated import Kernels
from emulator_build import build_feed_forward
from fakes import FakesAgree
from gated_checks import GatedCase as Case
from gated_checks import check_gated, check_gated_dropout

import fuseformer as ff
from fuseformer.testing import assert_close_to_reference

BF16, FP16 = torch.bfloat16, torch.float16


@pytest.fixture(scope="module")
def plain():
    return Kernels(build_feed_forward("plain"))


@pytest.fixture(scope="module")
def shadow():
    return Kernels(build_feed_forward("shadow"))


CASES = [
    Case((17, 40, 72, 40), "relu", BF16),
    Case((49, 8, 136, 24), "relu", BF16, 0.3),
    Case((63, 40, 104, 40), "relu", FP16, 0.3),
    Case((33, 320, 96, 320), "gelu", BF16, 0.5),
    Case((130, 24, 40, 8), "gelu_tanh", BF16),
    Case((113, 40, 128, 40), "gelu_tanh", FP16, 0.1),
    Case((31, 40, 72, 264), "silu", BF16, 0.2),
    Case((257, 96, 104, 96), "silu", FP16),
    Case((300, 64, 264, 40), "gelu", BF16, 0.1),
    Case((128, 128, 128, 64), "silu", FP16, 0.1),
    Case((1100, 72, 264, 8), "silu", BF16),
]


@pytest.mark.parametrize("rounding", ["exact", "chained", "truncating"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_the_oracle(case, rounding, plain):
    plain.emulator.set_options(False, 1, "late", rounding, 80)
    check_gated(plain, case)


@pytest.mark.parametrize("landing", ["late", "early", "random"])
@pytest.mark.parametrize("case", CASES[3:6] + CASES[8:10], ids=str)
def test_no_access_is_wrong_in_any_order(case, landing, shadow):
    shadow.emulator.set_options(True, 2, landing, "exact", 86)
    check_gated(shadow, case)


@pytest.mark.parametrize(("size", "dropout_p"), [(40, 0.1), (136, 0.75)])
def test_dropout_decides_as_defined_both_ways(size, dropout_p, plain):
    plain.emulator.set_options(False, 1, "late", "exact", 80)
    check_gated_dropout(plain, size, dropout_p)


def test_the_products_have_no_bank_conflict(shadow):
    shadow.emulator.set_options(False, 1, "late", "exact", 80)
    counts = []
    for width in (64, 640):
        x, gate, up = (torch.randn(128, width).to(BF16) for _ in range(3))
        act = torch.empty(128, 128, dtype=BF16)
        shadow.ops.gated_activation(x, gate, up, act, None, None, None, "relu", 0, 1.0)
        counts.append(shadow.ops.counters)
    assert counts[1]["ldmatrix"] == 10 * counts[0]["ldmatrix"]
    # One copy of the tokens serves both products: 128 rows of them, 256 of weights.
    assert [c["copies"] for c in counts] == [(128 + 256) * width // 8 for width in (64, 640)]
    assert [c["ldmatrix_conflicts"] for c in counts] == [0, 0]
    assert [c["shared_conflicts"] for c in counts] == [0, 0]


def test_the_gradient_has_no_bank_conflict(shadow):
    shadow.emulator.set_options(False, 1, "late", "exact", 80)
    tensors = [torch.randn(64, 128).to(BF16) for _ in range(5)]
    shadow.ops.gated_gradient(*tensors, torch.tensor(7), "silu", 6554, 1.1)
    assert shadow.ops.counters["shared_conflicts"] == 0


def test_values_that_are_not_finite_stay_where_they_are(plain):
    """An infinite token makes its own row so, as in PyTorch, and no other."""
    x, gate, up = (torch.randn(20, 16).to(FP16) for _ in range(3))
    gate, up = torch.cat((gate, gate)), torch.cat((up, up))
    x[2, 3], x[4, 0] = torch.inf, torch.nan
    down = torch.randn(16, 40).to(FP16)
    others = [row for row in range(20) if row not in (2, 4)]
    for activation in ("relu", "gelu", "gelu_tanh", "silu"):
        y, *firsts = plain.gated_feed_forward_forward(x, gate, up, down, None, activation, 0.0)
        for first in firsts:
            assert first[others].isfinite().all()
            assert not first[2].isfinite().any()
        assert y[others].isfinite().all()
        assert y[4].isnan().all()


def test_nothing_is_kept(plain):
    plain.emulator.set_options(False, 1, "late", "exact", 80)
    x, w = torch.randn(20, 16).to(BF16), torch.randn(24, 16).to(BF16)
    y, *firsts = plain.gated_feed_forward_forward(x, w, w, w.T, torch.tensor(1), "silu", 1.0)
    assert not y.any()
    gradients = plain.gated_feed_forward_backward(
        y, x, w, w, w.T, *firsts, torch.tensor(1), "silu", 1.0
    )
    assert not any(g.any() for g in gradients)


@pytest.mark.parametrize("sizes", [(0, 16, 24, 8), (5, 16, 0, 8), (5, 0, 24, 8), (5, 16, 24, 0)])
def test_empty_tensors(sizes, plain):
    tokens, width, hidden, out = sizes
    x, gate, down = (
        torch.ones(*s, dtype=BF16) for s in ((tokens, width), (hidden, width), (out, hidden))
    )
    y, *firsts = plain.gated_feed_forward_forward(x, gate, gate, down, None, "silu", 0.0)
    assert y.shape == (tokens, out)
    assert width > 0 < hidden or not y.any()
    gradients = plain.gated_feed_forward_backward(
        y, x, gate, gate, down, *firsts, None, "silu", 0.0
    )
    shapes = [x.shape, gate.shape, gate.shape, down.shape]
    assert [g.shape for g in gradients] == shapes


def test_rows_of_larger_tensors(shadow):
    """Weights that lie in one matrix are read where they are; nothing beside a result is written.

    Weights whose rows are unequally far apart are copied.
    """
    shadow.emulator.set_options(True, 1, "random", "exact", 80)
    both = torch.randn(2 * 72, 40).to(BF16)
    x, down = torch.randn(70, 40).to(BF16), torch.randn(40, 72).to(BF16)
    options = (None, "silu", 0.0)
    expected = shadow.gated_feed_forward_forward(x, *both.clone().chunk(2), down, *options)
    wide = torch.randn(72, 56).to(BF16)
    wide[:, 8:48] = both[:72]
    for gate in (both[:72], wide[:, 8:48]):
        got = shadow.gated_feed_forward_forward(x, gate, both[72:], down, *options)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    around = torch.full((72, 88), 7.0, dtype=BF16)
    act = around[1:-1, 8:-8]
    shadow.ops.gated_activation(x, *both.chunk(2), act, None, None, None, "silu", 0, 1.0)
    assert torch.equal(torch.nn.functional.linear(act, down), expected[0])
    act.fill_(7.0)
    assert (around == 7.0).all()


def test_every_result_repeats_to_the_last_bit_in_any_order(plain):
    x, w = torch.randn(150, 40).to(BF16), torch.randn(136, 40).to(BF16)
    runs = []
    for seed, landing in ((1, "late"), (2, "random"), (3, "early")):
        plain.emulator.set_options(True, seed, landing, "exact", 80)
        runs.append(plain.gated_feed_forward_forward(x, w, w, w.T, None, "gelu", 0.0))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


CALLS = {
    "gated": lambda x, a, b, c, **o: ff.gated_feed_forward(x, a, b, c.T, **o),
    "plain": lambda x, a, b, c, **o: ff.feed_forward(x, a, None, c.T, None, **o),
}


@pytest.mark.parametrize("tokens", [7, 21])
@pytest.mark.parametrize("name", CALLS)
def test_the_public_ops_with_gradients(name, tokens, plain):
    """Results lie as fakes promise, and nothing is saved where no backward pass follows."""
    plain.emulator.set_options(False, 1, "late", "exact", 80)
    torch.manual_seed(0)
    inputs = [torch.randn(*s).to(BF16) for s in ((tokens, 40), (72, 40), (72, 40), (72, 40))]
    inputs[0] = inputs[0].view(1, tokens, 40)
    call, options = CALLS[name], {"activation": "silu", "dropout_p": 0.2, "seed": 3}
    results = []
    for backend, dtype in (("cuda", BF16), ("reference", BF16), ("reference", torch.float64)):
        leaves = [t.to(dtype).requires_grad_() for t in inputs]
        used = leaves if name == "gated" else [leaves[0], leaves[1], leaves[3]]
        with plain.installed(), ff.explain() as decisions, FakesAgree() as agree:
            y = call(*leaves, backend=backend, **options)
            gradients = torch.autograd.grad(y.float().square().sum(), used)
            if backend == "cuda":
                with torch.no_grad():
                    assert torch.equal(call(*leaves, backend=backend, **options), y)
        if backend == "cuda":
            assert len(agree.seen) == 3
            assert [d.backend for d in decisions.decisions] == ["cuda"] * 2
            assert [d.request.trains for d in decisions.decisions] == [True, False]
            assert decisions.decisions[0].request.activation == "silu"
        results.append([y, *gradients])
    for place, (got, low, exact) in enumerate(zip(*results, strict=True)):
        assert_close_to_reference(got, exact, low, factor=3.0 if place else 2.0)


def test_products_that_were_not_saved_are_computed_again(plain):
    plain.emulator.set_options(False, 1, "late", "exact", 80)

    def forward(*arguments):
        y, *firsts = plain.gated_feed_forward_forward(*arguments, False)
        assert all(first.shape == (0,) for first in firsts)
        return y, *firsts

    unsaved = SimpleNamespace(
        gated_feed_forward_forward=forward,
        gated_feed_forward_backward=plain.gated_feed_forward_backward,
    )
    for tokens in (9, 40):
        check_gated(unsaved, Case((tokens, 40, 72, 40), "silu", BF16, 0.2))


def matrices(**changed):
    given = {
        "x": torch.zeros(4, 16, dtype=BF16),
        "w_gate": torch.zeros(24, 16, dtype=BF16),
        "w_up": torch.zeros(24, 16, dtype=BF16),
        "act": torch.zeros(4, 24, dtype=BF16),
        "gate_pre": None,
        "up": None,
        "seed": None,
        "activation": "relu",
        "threshold": 0,
        "scale": 1.0,
    }
    return (given | changed).values()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"x": torch.zeros(4, 12, dtype=BF16)}, "x: got 12 columns, expected a multiple of 8"),
        (
            {"w_gate": torch.zeros(24, 8, dtype=BF16)},
            r"w_gate: got shape \(24, 8\), expected \(24, 16\)",
        ),
        ({"w_up": torch.zeros(24, 16, dtype=FP16)}, "w_up: got float16, expected bfloat16"),
        (
            {"w_up": torch.zeros(24, 24, dtype=BF16)[:, :16]},
            r"w_up: got strides \(24, 1\), expected \(16, 1\) as w_gate",
        ),
        ({"act": torch.zeros(4, 16, dtype=BF16)}, r"act: got shape \(4, 16\), expected \(4, 24\)"),
        ({"up": torch.zeros(4, 24, dtype=BF16)}, "up: got one of gate_pre and up, expected both"),
        ({"seed": torch.zeros(1)}, "seed: got float32, expected int64"),
        ({"activation": "tanh"}, "activation: got 'tanh', expected relu"),
    ],
)
def test_the_compiled_op_names_what_is_wrong(changed, said, plain):
    with pytest.raises(ValueError, match=said):
        plain.ops.gated_activation(*matrices(**changed))
    plain.ops.gated_activation(*matrices())


def test_the_compiled_gradient_names_what_is_wrong(plain):
    given = [torch.zeros(4, 24, dtype=BF16) for _ in range(5)]
    rest = (None, "relu", 0, 1.0)
    for place, name in enumerate(("gate_pre", "up", "dup", "act"), 1):
        wrong = [*given[:place], torch.zeros(4, 16, dtype=BF16), *given[place + 1 :]]
        with pytest.raises(ValueError, match=rf"{name}: got shape \(4, 16\), expected \(4, 24\)"):
            plain.ops.gated_gradient(*wrong, *rest)
    plain.ops.gated_gradient(*given, *rest)
