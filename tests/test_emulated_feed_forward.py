"""The CUDA C++ feed-forward kernels, executed on the CPU from the source that ships."""

import pytest
import torch
from emulated_feed_forward import Case, FeedForward, check
from emulator_build import build_feed_forward
from matrix import case_name, cases

from fuseformer import reference
from fuseformer.philox import dropout_scale, keep_mask

BF16, FP16 = torch.bfloat16, torch.float16
ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu")
OPTIONS = {
    "tokens": (1, 63, 113, 130),
    "width": (64, 128, 256),
    "hidden": (64, 200, 512),
    "dtype": (BF16, FP16),
    "activation": ACTIVATIONS,
    "biases": ("both", "b1", "b2", "none"),
    "dropout_p": (0.0, 0.2),
    "rounding": ("exact", "chained", "truncating"),
}


@pytest.fixture(scope="module")
def plain():
    return FeedForward(build_feed_forward("plain"))


@pytest.fixture(scope="module")
def shadow():
    """Every access is checked for bounds, alignment, initialisation and races."""
    return FeedForward(build_feed_forward("shadow"))


def set_options(kernels, seed=1, landing="late", rounding="exact", random=False, architecture=80):
    kernels.emulator.set_options(random, seed, landing, rounding, architecture)


def call(kernels, case, **changed):
    x, w1, b1, w2, b2 = case.inputs()
    inputs = {"x": x, "w1": w1, "b1": b1, "w2": w2, "b2": b2, "activation": case.activation}
    return kernels(**inputs | changed)


@pytest.mark.parametrize("case", cases(OPTIONS, options=()), ids=case_name)
def test_any_two_options_match_the_oracle(case, plain):
    set_options(plain, rounding=case["rounding"])
    check(plain, Case(**{name: case[name] for name in OPTIONS if name != "rounding"}))


CHECKED = [
    Case(130, 128, 200, BF16, dropout_p=0.2),
    Case(63, 128, 64, FP16, "gelu", "none"),
    Case(70, 256, 104, FP16, "silu", "b1"),
    Case(65, 256, 96, BF16, "gelu_tanh", "b2", 0.1),
    Case(129, 64, 136, BF16),
]


@pytest.mark.parametrize("landing", ["late", "early", "random"])
@pytest.mark.parametrize("case", CHECKED, ids=str)
def test_no_access_is_wrong_in_any_order(case, landing, shadow):
    for seed in (1, 2):
        set_options(shadow, seed, landing, random=True)
        check(shadow, case)
    assert shadow.counters["accesses"] > 0


@pytest.mark.parametrize("architecture", [86, 120])
@pytest.mark.parametrize("width", [64, 128, 256])
def test_tiles_fit_where_there_is_less_shared_memory(width, architecture, plain):
    set_options(plain, architecture=architecture)
    check(plain, Case(20, width, 64, BF16))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_activations_by_themselves(activation, dtype, plain):
    """Where both matrices select, the output is the activation of the tokens: of all exponents."""
    set_options(plain)
    x = torch.linspace(-12, 12, 128 * 128).view(128, 128)
    x[::2] = x[::2].sign() * 2.0 ** (x[::2].abs() * 2 - 20)
    x, eye = x.to(dtype), torch.eye(128, dtype=dtype)
    y = plain(x, eye, None, eye, None, activation=activation).double()
    exact = reference.feed_forward(
        x.double(), eye.double(), None, eye.double(), None, activation=activation
    )
    # Half a unit in the last place, and what approximations may add to it.
    ulp = torch.finfo(dtype).eps
    slack = torch.finfo(dtype).smallest_normal * ulp if dtype == FP16 else 1e-7
    assert ((y - exact).abs() <= exact.abs() * (0.5 * ulp * 1.1) + 1e-6 + slack).all()


def test_not_a_number_stays_one(plain):
    set_options(plain)
    case = Case(40, 128, 72, BF16)
    x = case.inputs()[0]
    x[3, 5] = torch.nan
    for activation in ACTIVATIONS:
        y = call(plain, case, x=x, activation=activation)
        assert y[3].isnan().all()
        assert not torch.cat((y[:3], y[4:])).isnan().any()


def test_an_infinite_token_meets_no_unit_that_does_not_exist(plain):
    """Units past the last have weights of 0: infinity times that would be NaN."""
    set_options(plain)
    case = Case(9, 128, 72, BF16)
    x, w1, b1, w2, b2 = case.inputs()
    x[2, 0], w1[:, 0] = -torch.inf, w1[:, 0].abs() + 0.1
    y = plain(x, w1, b1, w2, b2, activation="relu")
    assert torch.equal(y[2], b2)


@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("dropout_p", [0.1, 0.5])
def test_the_dropout_mask_is_that_of_every_backend(width, dropout_p, plain):
    """Each hidden unit is 1 and has one output of its own, which shows whether it was kept."""
    set_options(plain)
    tokens, seed = 150, torch.tensor(-7)
    x, w1 = torch.zeros(tokens, width, dtype=FP16), torch.zeros(2 * width, width, dtype=FP16)
    b1, eye = torch.ones(2 * width, dtype=FP16), torch.eye(width, dtype=FP16)
    kept = []
    for units in range(2):
        w2 = torch.zeros(width, 2 * width, dtype=FP16)
        w2[:, units * width : (units + 1) * width] = eye
        options = {"activation": "relu", "dropout_p": dropout_p, "seed": seed}
        kept.append(plain(x, w1, b1, w2, None, **options))
    keep = keep_mask(seed, dropout_p, range(1), range(1), range(tokens), 2 * width)[0, 0]
    assert torch.equal(torch.cat(kept, 1), (keep * dropout_scale(dropout_p)).to(FP16))


def test_nothing_is_kept(plain):
    set_options(plain)
    case = Case(20, 128, 64, BF16)
    y = call(plain, case, dropout_p=1.0, seed=torch.tensor(1))
    assert torch.equal(y, case.inputs()[4].expand_as(y))


def test_every_result_repeats_to_the_last_bit_in_any_order(plain):
    case, runs = Case(150, 128, 136, BF16, "gelu"), []
    for seed, landing in ((1, "late"), (2, "random"), (3, "early")):
        set_options(plain, seed, landing, random=True)
        runs.append(call(plain, case))
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])


def test_rows_of_larger_tensors(shadow):
    """Strides are looked at, and what lies between the rows is left alone."""
    set_options(shadow)
    case = Case(70, 128, 72, BF16)
    expected = call(shadow, case)

    def wider(t):
        around = torch.full((t.shape[0] + 2, t.shape[1] + 16), 7.0, dtype=t.dtype)
        around[1:-1, 8:-8] = t
        return around[1:-1, 8:-8]

    x, _, _, w2, _ = case.inputs()
    y = wider(torch.full_like(x, 5.0))
    assert torch.equal(call(shadow, case, x=wider(x), w2=wider(w2), y=y), expected)
    around = y.as_strided((72, 144), (144, 1), 0).clone()
    around[1:-1, 8:-8] = 7.0
    assert (around == 7.0).all()


def test_empty_tensors(plain):
    set_options(plain)
    assert call(plain, Case(0, 128, 64, BF16)).shape == (0, 128)
    case = Case(5, 128, 0, BF16)
    y = call(plain, case)
    assert torch.equal(y, case.inputs()[4].expand_as(y))
    assert not call(plain, case, b2=None).any()


def test_wrong_arguments_are_named(plain):
    case = Case(16, 128, 64, BF16)
    x, w1, b1, w2, b2 = case.inputs()
    wrong = [
        ({"w1": w1[:, :64]}, r"w1: got shape \(64, 64\), expected \(64, 128\)"),
        ({"w1": torch.cat((w1, w1), 1)[:, :128]}, "w1: got strides .* a contiguous tensor"),
        ({"w2": w2.t()}, r"w2: got shape \(64, 128\), expected \(128, 64\)"),
        ({"b1": b1[:8]}, r"b1: got shape \(8,\), expected \(64,\)"),
        ({"b2": b2.half()}, "b2: got float16, expected bfloat16"),
        ({"x": x.float()}, "x: got float32, expected bfloat16 or float16"),
        ({"x": x[0]}, r"x: got shape \(128,\), expected 2 dimensions"),
        ({"w1": w1[:60], "b1": b1[:60], "w2": w2[:, :60]}, "w1: got 60 hidden units"),
        ({"x": x.t().contiguous().t()}, "x: got stride 16 in the last dimension"),
        ({"activation": "tanh"}, "activation: got 'tanh', expected relu"),
        ({"dropout_p": 0.1, "seed": torch.zeros(2, dtype=torch.int64)}, "seed: got shape"),
    ]
    for changed, message in wrong:
        with pytest.raises(ValueError, match=message):
            call(plain, case, **changed)
    narrow = Case(16, 96, 64, BF16)
    with pytest.raises(RuntimeError, match="no forward kernel of this width"):
        call(plain, narrow)
