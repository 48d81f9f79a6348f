"""Feed-forward of a few tokens by CUDA C++ kernels, executed on the CPU from what ships."""

import math

import pytest
import torch
from block_checks import (
    FeedForwardCase,
    check_feed_forward,
    check_feed_forward_dropout,
    check_no_columns,
)
from emulated import Kernels
from emulator_build import build_feed_forward
from gated_checks import GatedCase, check_gated, check_gated_dropout

import fuseformer as ff
from fuseformer import reference
from fuseformer.cuda import few_rows
from fuseformer.philox import keep_mask
from fuseformer.testing import assert_close_to_reference

BF16, FP16 = torch.bfloat16, torch.float16


@pytest.fixture(scope="module")
def plain():
    return Kernels(build_feed_forward("plain"))


@pytest.fixture(scope="module")
def shadow():
    return Kernels(build_feed_forward("shadow"))


def check(kernels, case):
    gated = isinstance(case, GatedCase)
    (check_gated if gated else check_feed_forward)(kernels, case)
    assert kernels.counters["ldmatrix_conflicts"] == 0


CASES = [
    FeedForwardCase((1, 40, 72, 40), "relu", BF16),
    FeedForwardCase((16, 8, 136, 24), "relu", BF16, 0.3, biases=False),
    FeedForwardCase((9, 264, 1032, 40), "gelu", FP16),
    FeedForwardCase((8, 320, 96, 320), "gelu", BF16, 0.5),
    FeedForwardCase((3, 104, 2056, 72), "gelu_tanh", FP16, 0.1, biases=False),
    FeedForwardCase((16, 576, 64, 8), "silu", BF16),
    FeedForwardCase((13, 256, 1024, 256), "silu", FP16, 0.2),
    FeedForwardCase((5, 64, 40, 36), "relu", FP16),  # the last product is the vendor's
    GatedCase((1, 40, 72, 40), "silu", BF16),
    GatedCase((16, 8, 136, 24), "gelu", BF16, 0.3),
    GatedCase((9, 264, 1032, 40), "silu", FP16),
    GatedCase((7, 576, 24, 8), "relu", BF16, 0.1),
    GatedCase((13, 128, 1024, 36), "gelu_tanh", FP16, 0.2),
]


@pytest.mark.parametrize("rounding", ["exact", "chained", "truncating"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_the_oracle(case, rounding, plain):
    plain.emulator.set_options(False, 1, "late", rounding, 80)
    check(plain, case)


@pytest.mark.parametrize("landing", ["late", "early", "random"])
@pytest.mark.parametrize("case", CASES[1:4] + CASES[9:11], ids=str)
def test_no_access_is_wrong_in_any_order(case, landing, shadow):
    for seed in (1, 2):
        shadow.emulator.set_options(True, seed, landing, "exact", 86)
        check(shadow, case)


@pytest.mark.parametrize("parts", [1, 2, 5, 9])
def test_any_number_of_parts_gives_the_same_answer(parts, shadow, monkeypatch):
    """More parts than chunks too: some then have nothing to do."""
    monkeypatch.setattr(few_rows, "parts_of", lambda *_: parts)
    shadow.emulator.set_options(True, parts, "random", "exact", 80)
    generator = torch.Generator().manual_seed(0)
    act, w2, b2 = (
        torch.randn(*shape, generator=generator).to(BF16) for shape in ((11, 328), (72, 328), (72,))
    )
    with shadow.installed():
        y = few_rows.output(act, w2, b2)
    exact = torch.nn.functional.linear(act.double(), w2.double(), b2.double())
    assert_close_to_reference(y, exact, torch.nn.functional.linear(act, w2, b2))


def test_parts_are_whole_chunks_and_fill_a_gpu():
    assert few_rows.parts_of(11008, 4096) == 2
    assert few_rows.parts_of(4096, 1024) == 8
    assert few_rows.parts_of(64, 1024) == 1
    assert few_rows.parts_of(0, 0) == 0
    for hidden in range(8, 6000, 232):
        parts = few_rows.parts_of(hidden, 32)
        size = math.ceil(math.ceil(hidden / 64) / parts) * 64
        assert (parts - 1) * size < hidden <= parts * size


def test_every_weight_is_read_once(shadow, monkeypatch):
    """Sixteen bytes at a time: those of the weights once, those of the tokens by each block."""
    shadow.emulator.set_options(False, 1, "late", "exact", 80)
    monkeypatch.setattr(few_rows, "parts_of", lambda *_: 4)
    tokens, hidden, out = 16, 64, 96
    conflicts = []
    for width in (512, 1536):
        x, w1, w_up = (torch.randn(n, width).to(BF16) for n in (tokens, hidden, hidden))
        for gate, matrices in ((None, 1), (w_up, 2)):
            with shadow.installed():
                few_rows.hidden_activation(x, w1, None, gate, (None, "silu", 0, 1.0), False)
            weights, blocks = matrices * hidden * width, matrices * hidden // 32
            assert shadow.counters["copies"] == (weights + blocks * x.numel()) // 8
            conflicts.append(shadow.counters["shared_conflicts"])
        act, w2 = torch.randn(tokens, width).to(BF16), torch.randn(out, width).to(BF16)
        with shadow.installed():
            few_rows.output(act, w2, None)
        # The counters are of both launches: the sum of the parts begins no copies.
        assert shadow.counters["copies"] == (w2.numel() + out // 32 * act.numel()) // 8
        conflicts.append(shadow.counters["shared_conflicts"])
    # What there is, is of the end of a block: more columns have no more of it.
    assert conflicts[:3] == conflicts[3:]


@pytest.mark.parametrize("dropout_p", [0.1, 0.75])
def test_dropout_decides_as_defined_both_ways(dropout_p, plain):
    plain.emulator.set_options(False, 1, "late", "exact", 80)
    check_feed_forward_dropout(plain, 16, dropout_p)
    check_gated_dropout(plain, 16, dropout_p)
    # Of more hidden units than a block has.
    seed = torch.tensor(2**40 + 17)
    x, w1, b1 = torch.ones(16, 8), torch.zeros(136, 8), torch.ones(136)
    x, w1, b1 = (t.to(FP16) for t in (x, w1, b1))
    with plain.installed():
        dropout = (seed, "relu", round(dropout_p * 65536), 1.0)
        act, _, _ = few_rows.hidden_activation(x, w1, b1, None, dropout, False)
    keep = keep_mask(seed, dropout_p, range(1), range(1), range(16), 136)[0, 0]
    assert torch.equal(act != 0, keep)


def test_the_mask_is_that_of_many_tokens(plain):
    """The first tokens of a call keep what they keep alone."""
    x, w1 = torch.randn(40, 40).to(BF16), torch.randn(72, 40).to(BF16)
    w2 = torch.eye(72, dtype=BF16)
    options = (torch.tensor(5), "silu", 0.4)
    many, _ = plain.feed_forward_forward(x, w1, None, w2, None, *options)
    few, _ = plain.feed_forward_forward(x[:16], w1, None, w2, None, *options)
    assert torch.equal(many[:16] == 0, few == 0)


def test_what_is_saved_is_asked_for(plain):
    x, w = torch.randn(5, 40).to(BF16), torch.randn(72, 40).to(BF16)
    for saves in (True, False):
        _, pre = plain.feed_forward_forward(x, w, None, w.T, None, None, "silu", 0.0, saves)
        assert pre.shape == ((5, 72) if saves else (0,))
        _, *firsts = plain.gated_feed_forward_forward(x, w, w, w.T, None, "silu", 0.0, saves)
        assert all(first.shape == ((5, 72) if saves else (0,)) for first in firsts)


def test_values_that_are_not_finite_stay_where_they_are(plain):
    """An infinite token makes its own row so, as in PyTorch, and no other."""
    x, w1, w2 = (torch.randn(*s).to(FP16) for s in ((12, 16), (40, 16), (16, 40)))
    x[2, 3], x[9, 0] = torch.inf, torch.nan
    others = [row for row in range(12) if row not in (2, 9)]
    for activation in ("relu", "gelu", "gelu_tanh", "silu"):
        y, pre = plain.feed_forward_forward(x, w1, None, w2, None, None, activation, 0.0)
        gated, *_ = plain.gated_feed_forward_forward(x, w1, w1, w2, None, activation, 0.0)
        assert not pre[2].isfinite().any()
        for result in (y, pre, gated):
            assert result[others].isfinite().all()
            assert result[9].isnan().all()


@pytest.mark.parametrize("sizes", [(0, 16, 24, 8), (5, 16, 0, 8), (5, 0, 24, 8), (5, 16, 24, 0)])
def test_empty_tensors(sizes, plain):
    tokens, width, hidden, out = sizes
    shapes = {"x": (tokens, width), "w1": (hidden, width), "w2": (out, hidden)}
    x, w1, w2 = (torch.ones(*s, dtype=BF16) for s in shapes.values())
    b1, b2 = torch.ones(hidden, dtype=BF16), torch.ones(out, dtype=BF16)
    y, _ = plain.feed_forward_forward(x, w1, b1, w2, b2, None, "relu", 0.0)
    expected = reference.feed_forward(x, w1, b1, w2, b2, activation="relu", dropout_p=0.0)
    assert torch.equal(y, expected)
    y, *_ = plain.gated_feed_forward_forward(x, w1, w1, w2, None, "silu", 0.0)
    assert y.shape == (tokens, out)


def test_rows_of_larger_tensors(shadow):
    """Strides are looked at, and what lies beside a result is left alone."""
    shadow.emulator.set_options(True, 1, "random", "exact", 80)

    def wider(t):
        around = torch.full((t.shape[0] + 2, t.shape[1] + 16), 7.0, dtype=t.dtype)
        around[1:-1, 8:-8] = t
        return around[1:-1, 8:-8]

    x, w1, w_up = (torch.randn(n, 40).to(BF16) for n in (11, 72, 72))
    rest = (None, "silu", 0, 1.0)
    results = []
    for change in (torch.clone, wider):
        tensors = [change(torch.full((11, 72), 5.0, dtype=BF16)) for _ in range(3)]
        given = (change(x), change(w1), None, change(w_up), *tensors)
        shadow.ops.few_rows_hidden(*given, *rest)
        y = change(torch.full((11, 40), 5.0, dtype=BF16))
        shadow.ops.few_rows_output(tensors[0], change(w1.T.contiguous()), None, None, y)
        results.append([*tensors, y])
    for dense, wide in zip(*results, strict=True):
        assert torch.equal(dense, wide)
        around = wide.as_strided((13, wide.shape[1] + 16), (wide.shape[1] + 16, 1), 0).clone()
        around[1:-1, 8:-8] = 7.0
        assert (around == 7.0).all()


def test_every_result_repeats_to_the_last_bit_in_any_order(plain):
    x, w1, w2 = (torch.randn(*s).to(BF16) for s in ((12, 328), (1032, 328), (40, 1032)))
    runs = []
    for seed, landing in ((1, "late"), (2, "random"), (3, "early")):
        plain.emulator.set_options(True, seed, landing, "exact", 80)
        runs.append(plain.feed_forward_forward(x, w1, None, w2, None, None, "gelu", 0.0))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def test_the_public_ops(plain):
    torch.manual_seed(0)
    x, w1, w2 = (torch.randn(*s).to(BF16) for s in ((3, 5, 40), (72, 40), (40, 72)))
    with plain.installed():
        for call in (
            lambda x, w1, w2, b: ff.feed_forward(x, w1, None, w2, None, backend=b),
            lambda x, w1, w2, b: ff.gated_feed_forward(x, w1, w1, w2, backend=b),
        ):
            got = call(x, w1, w2, "cuda")
            wide = (t.double() for t in (x, w1, w2))
            assert_close_to_reference(got, call(*wide, "reference"), call(x, w1, w2, "reference"))


def test_tokens_without_columns(plain):
    with plain.installed():
        check_no_columns("cuda", BF16)


def hidden_arguments(**changed):
    given = {
        "x": torch.zeros(4, 16, dtype=BF16),
        "w1": torch.zeros(24, 16, dtype=BF16),
        "b1": None,
        "w_up": None,
        "act": torch.zeros(4, 24, dtype=BF16),
        "pre": None,
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
        ({"x": torch.zeros(17, 16, dtype=BF16)}, "x: got 17 rows, expected at most 16"),
        ({"w1": torch.zeros(24, 8, dtype=BF16)}, r"w1: got shape \(24, 8\), expected \(24, 16\)"),
        ({"b1": torch.zeros(16, dtype=BF16)}, r"b1: got shape \(16,\), expected \(24,\)"),
        ({"w_up": torch.zeros(24, 16, dtype=FP16)}, "w_up: got float16, expected bfloat16"),
        ({"act": torch.zeros(4, 16, dtype=BF16)}, r"act: got shape \(4, 16\), expected \(4, 24\)"),
        ({"pre": torch.zeros(4, 16, dtype=BF16)}, r"pre: got shape \(4, 16\), expected \(4, 24\)"),
        ({"up": torch.zeros(4, 24, dtype=BF16)}, "up: got a tensor, expected None without w_up"),
        ({"seed": torch.zeros(1)}, "seed: got float32, expected int64"),
        ({"activation": "tanh"}, "activation: got 'tanh', expected relu"),
    ],
)
def test_the_compiled_op_names_what_is_wrong(changed, said, plain):
    with pytest.raises(ValueError, match=said):
        plain.ops.few_rows_hidden(*hidden_arguments(**changed))
    plain.ops.few_rows_hidden(*hidden_arguments())


@pytest.mark.parametrize(
    ("place", "wrong", "said"),
    [
        (0, torch.zeros(17, 24, dtype=BF16), "act: got 17 rows, expected at most 16"),
        (1, torch.zeros(16, 16, dtype=BF16), r"w2: got shape \(16, 16\), expected \(16, 24\)"),
        (2, torch.zeros(24, dtype=BF16), r"b2: got shape \(24,\), expected \(16,\)"),
        (3, torch.zeros(2, 4, 16, dtype=BF16), "partial: got bfloat16, expected float32"),
        (3, torch.zeros(2, 4, 24), r"partial: got shape \(2, 4, 24\), expected \(2, 4, 16\)"),
        (3, torch.zeros(0, 4, 16), "partial: got 0 parts, expected 1 to"),
        (4, torch.zeros(4, 12, dtype=BF16), "y: got 12 columns, expected a multiple of 8"),
    ],
)
def test_the_compiled_last_product_names_what_is_wrong(place, wrong, said, plain):
    given = [torch.zeros(*s, dtype=BF16) for s in ((4, 24), (16, 24), (16,))]
    given += [torch.zeros(2, 4, 16), torch.zeros(4, 16, dtype=BF16)]
    plain.ops.few_rows_output(*given)
    given[place] = wrong
    with pytest.raises(ValueError, match=said):
        plain.ops.few_rows_output(*given)
