"""The CUDA C++ attention kernels, executed on the CPU from the source that ships."""

import contextlib

import pytest
import torch
from attention_checks import Case, check_dense, check_dropout_mask, check_packed
from emulated import Kernels
from emulator_build import build
from matrix import case_name, cases

from fuseformer import reference
from fuseformer.cuda.attention import nondeterministic
from fuseformer.testing import assert_close_to_reference

BF16, FP16 = torch.bfloat16, torch.float16
LANDINGS = ("late", "early", "random")
ROUNDINGS = ("exact", "chained", "truncating")


@pytest.fixture(scope="module")
def plain():
    return Kernels(build("plain"))


@pytest.fixture(scope="module")
def shadow():
    """Every access is checked for bounds, alignment, initialisation and races."""
    return Kernels(build("shadow"))


# Heads, lengths, head dim; the rest of a call are options.
SHAPES = (
    ((6, 2), (63, 113), 32),
    ((2, 2), (113, 63), 64),
    ((5, 1), (111, 65), 96),
    ((2, 1), (1, 257), 128),
    ((1, 1), (257, 111), 64),
    ((1, 1), (300, 290), 128),
    ((2, 1), (113, 150), 256),
)
OPTIONS = {
    "causal": ("none", "top_left", "bottom_right"),
    "window": ((-1, -1), (40, 9), (70, -1)),
    "dropout_p": (0.0, 0.2),
    "key_lengths": ((), (50, 0)),
}


def more_than_one_key(case):
    """Of one visible key, flash attention finds the rounding of its output for a gradient."""
    return case["shape"][1][0] > 1 or case["causal"] != "top_left"


MATRIX = cases(
    {"dtype": (BF16, FP16), "shape": SHAPES, "rounding": ROUNDINGS, **OPTIONS},
    options=tuple(OPTIONS),
    allowed=more_than_one_key,
)


def set_options(kernels, seed=1, landing="late", rounding="exact", random=False):
    kernels.emulator.set_options(random, seed, landing, rounding, 80)


@pytest.mark.parametrize("case", MATRIX, ids=case_name)
def test_any_two_options_match_the_oracle(case, plain):
    set_options(plain, rounding=case["rounding"])
    options = {name: case[name] for name in OPTIONS}
    heads, lengths, head_dim = case["shape"]
    check_dense(plain, Case(heads, lengths, head_dim, case["dtype"], batch=2, **options))
    assert plain.counters["ldmatrix_conflicts"] == 0


CHECKED = [
    Case((2, 1), (113, 257), 64, BF16, "top_left", 0.1),
    Case((2, 2), (200, 140), 32, FP16, "bottom_right", window=(33, -1)),
    Case((1, 1), (65, 300), 96, BF16, window=(70, 20), key_lengths=(277,)),
    Case((2, 1), (257, 113), 128, BF16, "bottom_right", key_lengths=(0, 100), batch=2),
    Case((2, 1), (113, 150), 256, FP16, "top_left", 0.1),
    Case((1, 1), (150, 113), 256, BF16, window=(70, 20), key_lengths=(101,)),
]


@pytest.mark.parametrize("landing", LANDINGS)
@pytest.mark.parametrize("case", CHECKED, ids=str)
def test_no_access_is_wrong_in_any_order(case, landing, shadow):
    for seed in (1, 2):
        set_options(shadow, seed, landing, random=True)
        check_dense(shadow, case)
    assert shadow.counters["accesses"] > 0
    assert shadow.counters["shared_conflicts"] == 0


@pytest.mark.parametrize(
    ("head_dim", "architecture"), [(96, 86), (96, 89), (96, 120), (128, 86), (256, 86)]
)
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_tiles_for_less_shared_memory(head_dim, architecture, dropout_p, shadow):
    """The three have the same limit: what is launched differs by head dim alone."""
    shadow.emulator.set_options(True, 2, "random", "exact", architecture)
    case = Case((2, 1), (113, 170), head_dim, BF16, "bottom_right", dropout_p, window=(90, -1))
    check_dense(shadow, case)
    check_packed(shadow, ((70, 33), (0, 5), (3, 90)), head_dim, FP16, "none", dropout_p, 5)


@pytest.mark.parametrize("causal", ["none", "top_left", "bottom_right"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_packed_sequences(causal, dropout_p, plain):
    set_options(plain)
    sequences = ((63, 63), (0, 5), (17, 0), (130, 33), (1, 1))
    check_packed(plain, sequences, 64, BF16, causal, dropout_p, 9)
    check_packed(plain, sequences, 32, FP16, causal, dropout_p, 9, window=(20, -1))
    check_packed(plain, sequences, 256, BF16, causal, dropout_p, 9)


def test_packed_sequences_touch_nothing_else(shadow):
    set_options(shadow, 3, "random", random=True)
    check_packed(shadow, ((70, 33), (0, 5), (17, 0), (3, 90)), 64, BF16, "bottom_right", 0.2, 5)


@pytest.mark.parametrize("dropout_p", [0.1, 0.5])
def test_the_dropout_mask_is_that_of_every_backend(dropout_p, plain):
    """The same check that the Triton kernels pass, element for element."""
    set_options(plain)
    check_dropout_mask(plain, dropout_p)


def forward_and_backward(kernels, head_dim, dropout_p=0.0, deterministic=True):
    torch.manual_seed(0)
    queries, keys = (512, 512) if head_dim == 32 else (256, 256)  # there a block has few steps
    q, dout = (torch.randn(1, 2, queries, head_dim).to(BF16) for _ in range(2))
    k, v = (torch.randn(1, 2, keys, head_dim).to(BF16) for _ in range(2))
    # Of keys without values the gradient of the logits is the same for all, which adds to dq what
    # cancels, but for what depends on the order of the sums.
    k, v, scale = torch.cat((k, -k, 0 * k), 2), torch.cat((0 * v, 0 * v, v), 2), 1e-4
    plain = (None,) * 5
    options = (torch.tensor(5), "bottom_right", -1, -1, 0.0, scale, dropout_p)
    out, lse = kernels.attention_forward(q, k, v, *plain, *options)
    with contextlib.nullcontext() if deterministic else nondeterministic():
        grads = kernels.attention_backward(dout, lse, q, k, v, out, lse, *plain, *options, False)
    return out, lse, *grads[:3]


ORDERS = [(1, "late"), (2, "random"), (3, "early"), (4, "late")]


@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 256])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_every_result_repeats_to_the_last_bit_in_any_order(head_dim, dropout_p, plain):
    runs = []
    for seed, landing in ORDERS:
        set_options(plain, seed, landing, random=True)
        runs.append(forward_and_backward(plain, head_dim, dropout_p))
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 256])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_without_turns_the_sums_come_in_any_order(head_dim, dropout_p, plain):
    """Which shows that the test above looks at something."""
    set_options(plain)
    in_order = forward_and_backward(plain, head_dim, dropout_p)
    without = forward_and_backward(plain, head_dim, dropout_p, deterministic=False)
    for a, b in zip(in_order, without, strict=True):
        assert torch.equal(a, b)  # blocks run one after the other here
    runs = []
    for seed, landing in ORDERS:
        set_options(plain, seed, landing, random=True)
        runs.append(forward_and_backward(plain, head_dim, dropout_p, deterministic=False))
    dq = 2
    assert all((run[dq] != runs[0][dq]).sum() > 50 for run in runs[1:])
    for run in runs:
        assert all(torch.equal(run[i], in_order[i]) for i in (0, 1, 3, 4))


@pytest.mark.parametrize(("batch", "sq", "sk"), [(2, 0, 5), (2, 5, 0), (2, 0, 0)])
def test_empty_tensors(batch, sq, sk, plain):
    set_options(plain)
    q, k = torch.ones(batch, 2, sq, 64, dtype=BF16), torch.ones(batch, 1, sk, 64, dtype=BF16)
    options = (*(None,) * 6, "none", -1, -1, 0.0, 1.0, 0.0)
    out, lse = plain.attention_forward(q, k, k, *options)
    assert not out.any()
    assert (lse == -torch.inf).all()
    for grad in plain.attention_backward(out, None, q, k, k, out, lse, *options, False)[:3]:
        assert not grad.any()


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("causal", ["none", "top_left"])
def test_head_dim_256_forward(dtype, causal, shadow):
    set_options(shadow, 1, "random", random=True)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, n, 256).to(dtype) for n in (100, 150, 150))
    lengths = torch.tensor([130], dtype=torch.int32)
    results = shadow.attention_forward(
        q, k, v, None, None, lengths, *(None,) * 3, causal, -1, -1, 0.0, 0.07, 0.0
    )
    options = {"causal": causal, "key_lengths": lengths, "scale": 0.07}
    exact = reference.attention(*(x.double() for x in (q, k, v)), **options)
    low = reference.attention(q, k, v, **options)
    for a, e, b in zip(results, exact, low, strict=True):
        assert_close_to_reference(a, e, b)
