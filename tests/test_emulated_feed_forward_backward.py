"""The CUDA C++ feed-forward backward kernel, executed on the CPU from the source that ships."""

import pytest
import torch
from block_checks import FeedForwardCase, check_feed_forward, check_feed_forward_dropout
from emulated import Kernels
from emulated_feed_forward import Backward, Case, check_backward, check_infinite_gradient
from emulator_build import build_feed_forward
from matrix import case_name, cases

import fuseformer as ff

BF16, FP16 = torch.bfloat16, torch.float16
OPTIONS = {
    "tokens": (1, 63, 113, 257),
    "width": (64, 128, 256),
    "hidden": (8, 72, 136, 256),
    "dtype": (BF16, FP16),
    "activation": ("relu", "gelu", "gelu_tanh", "silu"),
    "biases": ("both", "none"),
    "dropout_p": (0.0, 0.2),
    "splits": (1, 2, 3),
    "rounding": ("exact", "chained", "truncating"),
    "architecture": (80, 86),
}


@pytest.fixture(scope="module")
def plain():
    return Backward(build_feed_forward("plain"))


@pytest.fixture(scope="module")
def shadow():
    """Every access is checked for bounds, alignment, initialisation and races."""
    return Backward(build_feed_forward("shadow"))


def set_options(kernels, seed=1, landing="late", rounding="exact", random=False, architecture=80):
    kernels.emulator.set_options(random, seed, landing, rounding, architecture)


def call(kernels, case, **changed):
    x, w1, b1, w2, _ = case.inputs()
    inputs = {"dy": case.dy(), "x": x, "w1": w1, "b1": b1, "w2": w2}
    return kernels(**inputs | {"activation": case.activation} | changed)


@pytest.mark.parametrize("case", cases(OPTIONS, options=()), ids=case_name)
def test_any_two_options_match_the_oracle(case, plain):
    set_options(plain, rounding=case["rounding"], architecture=case["architecture"])
    names = ("tokens", "width", "hidden", "dtype", "activation", "biases", "dropout_p")
    check_backward(plain, Case(**{name: case[name] for name in names}), case["splits"])


CHECKED = [
    (Case(200, 64, 200, BF16, "relu", "both", 0.2), 2),
    (Case(130, 128, 136, FP16, "relu", "none"), 1),
    (Case(65, 128, 72, BF16, "gelu", "b1", 0.1), 2),
    (Case(130, 256, 104, BF16, "relu", "both"), 1),
    (Case(70, 256, 72, FP16, "silu", "both", 0.3), 2),
]


@pytest.mark.parametrize("landing", ["late", "early", "random"])
@pytest.mark.parametrize("architecture", [80, 86])
@pytest.mark.parametrize(("case", "splits"), CHECKED, ids=str)
def test_no_access_is_wrong_in_any_order(case, splits, architecture, landing, shadow):
    set_options(shadow, 2, landing, random=True, architecture=architecture)
    check_backward(shadow, case, splits)
    assert shadow.counters["accesses"] > 0


@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("dropout_p", [0.1, 0.5])
def test_the_dropout_mask_is_that_of_every_backend(width, dropout_p, plain):
    kernels = Kernels(plain.emulator)
    for architecture in (80, 86):
        set_options(plain, architecture=architecture)
        check_feed_forward_dropout(kernels, width, dropout_p)


def test_nothing_is_kept(plain):
    set_options(plain)
    gradients = call(plain, Case(20, 128, 64, BF16), dropout_p=1.0, seed=torch.tensor(1))
    assert not any(gradient.any() for gradient in gradients.values())


def test_every_result_repeats_to_the_last_bit_in_any_order(plain):
    case, runs = Case(330, 128, 264, BF16, "gelu"), []
    for seed, landing in ((1, "late"), (2, "random"), (3, "early")):
        set_options(plain, seed, landing, random=True)
        runs.append(call(plain, case, splits=3))
    for name, first in runs[0].items():
        assert all(torch.equal(first, run[name]) for run in runs[1:]), name


def test_a_split_may_have_no_tokens(shadow):
    """Six steps over five splits: two a split, none for the last two."""
    set_options(shadow)
    check_backward(shadow, Case(370, 64, 40, BF16), splits=5)


@pytest.mark.parametrize("width", [64, 128, 256])
def test_an_infinite_gradient_meets_no_unit_that_does_not_exist(width, plain):
    set_options(plain)
    check_infinite_gradient(plain, width)


def test_not_a_number_stays_where_it_is(plain):
    set_options(plain)
    case = Case(40, 128, 72, BF16, "silu")
    dy = case.dy()
    dy[3, 5] = torch.nan
    dx = call(plain, case, dy=dy)["dx"]
    assert dx[3].isnan().all()
    assert not torch.cat((dx[:3], dx[4:])).isnan().any()


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
    dx = wider(torch.full_like(x, 5.0))
    strided = {"dy": wider(case.dy()), "x": wider(x), "w2": wider(w2), "dx": dx}
    actual = call(shadow, case, **strided)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    around = dx.as_strided((72, 144), (144, 1), 0).clone()
    around[1:-1, 8:-8] = 7.0
    assert (around == 7.0).all()


@pytest.mark.parametrize("splits", [1, 2])
def test_empty_tensors(splits, plain):
    set_options(plain)
    no_tokens = call(plain, Case(0, 128, 72, BF16), splits=splits)
    assert no_tokens["dx"].shape == (0, 128)
    assert not any(no_tokens[name].any() for name in ("dw1", "db1", "dw2"))
    no_units = call(plain, Case(5, 128, 0, BF16), splits=splits)
    assert not no_units["dx"].any()
    assert no_units["dw1"].shape == (0, 128)


RESIDENT = [
    FeedForwardCase((1, 64, 40, 64), "gelu_tanh", BF16, 0.1, biases=False),
    FeedForwardCase((600, 64, 136, 64), "relu", FP16),
    FeedForwardCase((1100, 128, 72, 128), "silu", BF16, 0.2),
    FeedForwardCase((70, 256, 200, 256), "gelu", FP16),
]


@pytest.mark.parametrize("case", RESIDENT, ids=str)
def test_the_module_that_ships_splits_by_itself(case, plain):
    set_options(plain)
    check_feed_forward(Kernels(plain.emulator), case)


def test_gradients_of_the_public_op_come_from_the_kernel(plain):
    set_options(plain)
    kernels = Kernels(plain.emulator)
    x, w1, b1, w2, b2 = (t.requires_grad_() for t in Case(33, 64, 40, BF16).inputs())
    with kernels.installed():
        y = ff.feed_forward(x, w1, b1, w2, b2, activation="gelu", backend="cuda")
        y.float().sum().backward()
    assert kernels.counters["mma"] > 0
    assert all(t.grad is not None and t.grad.shape == t.shape for t in (x, w1, b1, w2, b2))


def test_wrong_arguments_are_named(plain):
    set_options(plain)
    case = Case(16, 128, 64, BF16)
    x, w1, b1, w2, _ = case.inputs()
    dy = case.dy()
    wrong = [
        ({"dy": dy[:8]}, r"dy: got shape \(8, 128\), expected \(16, 128\)"),
        ({"dy": dy.half()}, "dy: got float16, expected bfloat16"),
        ({"w1": torch.cat((w1, w1), 1)[:, :128]}, "w1: got strides .* a contiguous tensor"),
        ({"w2": w2.t()}, r"w2: got shape \(64, 128\), expected \(128, 64\)"),
        ({"b1": b1[:8]}, r"b1: got shape \(8,\), expected \(64,\)"),
        ({"x": x.float()}, "x: got float32, expected bfloat16 or float16"),
        ({"w1": w1[:60], "b1": b1[:60], "w2": w2[:, :60]}, "w1: got 60 hidden units"),
        ({"dx": x[:8]}, r"dx: got shape \(8, 128\), expected \(16, 128\)"),
        ({"dw1": w1.t()}, r"dw1: got shape \(128, 64\), expected \(64, 128\)"),
        ({"dw2": w2.t().contiguous().t()}, "dw2: got stride 128 in the last dimension"),
        ({"db1": b1[:8]}, r"db1: got shape \(8,\), expected \(64,\)"),
        ({"dx_sums": torch.zeros(1, 64, 128)}, "dx_sums: got shape .* 4 dimensions"),
        ({"dx_sums": torch.zeros(1, 1, 32, 128)}, "dx_sums: got shape"),
        ({"turns": torch.zeros(1, 1)}, "turns: got float32, expected int32"),
        ({"weight_sums": torch.zeros(2, 64, 128)}, "weight_sums: got shape .* 4 dimensions"),
        ({"bias_sums": torch.zeros(2, 64)}, r"bias_sums: got shape \(2, 64\), expected \(1, 64\)"),
        ({"activation": "tanh"}, "activation: got 'tanh', expected relu"),
        ({"dropout_p": 0.1, "seed": torch.zeros(2, dtype=torch.int64)}, "seed: got shape"),
    ]
    for changed, message in wrong:
        with pytest.raises(ValueError, match=message):
            call(plain, case, **changed)
    with pytest.raises(ValueError, match="x: got 96 columns, expected 64, 128 or 256"):
        call(plain, Case(16, 96, 64, BF16))
