"""What acts on the logits in the Triton attention kernels, with its gradients."""

import pytest
import torch
from attention_checks import Case, check_dense, check_packed
from fuseformer.kernels import attention as kernels
from matrix import case_name, cases

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

pytestmark = pytest.mark.usefixtures("triton_on_cpu")

# Single precision has tiles of 32: short sequences have edges, full blocks and skipped ones.
CASES = [
    # a bias in every shape of broadcasting, and its gradient
    Case((2, 2), (113, 70), 16, FP32, bias="bhqk", batch=2),
    Case((2, 1), (63, 65), 40, FP32, "top_left", bias="hqk", batch=2),
    Case((2, 2), (40, 70), 16, FP32, bias="qk", batch=3),
    Case((2, 1), (70, 40), 16, FP32, bias="bk", batch=2),
    Case((2, 2), (65, 40), 16, FP32, "bottom_right", bias="hq", batch=2),
    Case((2, 2), (17, 33), 16, FP32, bias="b", batch=2),
    Case((4, 2), (130, 140), 64, BF16, bias="hqk", batch=2),
    Case((1, 1), (33, 40), 256, BF16, bias="qk"),
    # windows, on both diagonals, within causality and without it
    Case((1, 1), (150, 150), 16, FP32, window=(10, 5)),
    Case((2, 1), (150, 150), 16, FP32, "top_left", window=(40, -1)),
    Case((1, 1), (70, 150), 16, FP32, "bottom_right", window=(70, 0)),
    Case((1, 1), (150, 70), 16, FP32, "bottom_right", window=(0, 3), key_lengths=(60,)),
    Case((2, 1), (70, 150), 16, FP32, "bottom_right", window=(20, -1), key_lengths=(150, 90, 9),
         batch=3),
    Case((1, 1), (65, 150), 16, FP32, window=(-1, 20)),
    Case((1, 1), (113, 113), 16, FP32, window=(0, 0)),
    Case((2, 1), (300, 290), 64, BF16, window=(150, 60)),
    Case((1, 1), (257, 257), 32, FP16, "top_left", 0.2, window=(130, -1)),
    Case((1, 1), (113, 113), 16, FP32, window=(30, 20), padding=True),
    Case((1, 1), (40, 40), 16, FP32, window=(10**9, 10**9)),
    # softcap, ALiBi, sinks
    Case((1, 1), (113, 63), 40, FP32, softcap=5.0),
    Case((3, 3), (113, 63), 40, FP32, "bottom_right", alibi=True),
    Case((2, 2), (40, 113), 40, FP32, "bottom_right", alibi=True, key_lengths=(77, 20), batch=2),
    Case((1, 1), (40, 200), 16, FP32, "bottom_right", bias="qk", window=(8, -1),
         key_lengths=(200, 70), batch=2),
    Case((2, 2), (40, 70), 24, FP32, "bottom_right", sinks=True, batch=2),
    Case((2, 1), (70, 40), 64, BF16, "bottom_right", sinks=True, key_lengths=(0, 40), batch=2),
    # all together
    Case(
        (4, 2), (65, 97), 40, FP32, "bottom_right", 0.2, (97, 30), True, None, 2, "hqk",
        (40, -1), 15.0, True, True,
    ),
    Case(
        (2, 1), (97, 65), 72, BF16, "top_left", 0.1, (65, 30), False, -0.2, 2, "bk",
        (33, -1), 15.0, True, True,
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_options_match_the_oracle(case):
    check_dense(kernels, case)


# Heads, lengths and head dim; the rest of a call are options.
SHAPES = (
    ((6, 2), (63, 113), 40),
    ((2, 2), (113, 63), 72),
    ((5, 1), (111, 65), 96),
    ((2, 1), (1, 257), 80),
    ((1, 1), (257, 111), 64),
)
OPTIONS = {
    "causal": ("none", "top_left", "bottom_right"),
    "window": ((-1, -1), (40, 9)),
    "softcap": (0.0, 15.0),
    "bias": ("", "hqk"),
    "alibi": (False, True),
    "sinks": (False, True),
    "dropout_p": (0.0, 0.2),
    "padding": (False, True),
    "key_lengths": ((), (50, 0)),
}


def sees_more_than_one_key(case):
    """Whether the rule can be asked of a case.

    Of one visible key the logit has no gradient but that of the lse, and what flash attention finds
    in half precision is the rounding of its output: not so in single precision.
    """
    alone = case["shape"][1][0] == 1 and case["causal"] == "top_left"
    return not alone or case["dtype"] == FP32


MATRIX = cases(
    {"dtype": (BF16, FP16, FP32), "shape": SHAPES, **OPTIONS},
    options=tuple(OPTIONS),
    allowed=sees_more_than_one_key,
)


@pytest.mark.parametrize("case", MATRIX, ids=case_name)
def test_any_two_options_together_match_the_oracle(case):
    heads, lengths, head_dim = case["shape"]
    options = {name: case[name] for name in OPTIONS}
    check_dense(kernels, Case(heads, lengths, head_dim, case["dtype"], batch=2, **options))


@pytest.mark.parametrize(
    ("causal", "options"),
    [
        ("bottom_right", {"window": (20, -1), "sinks": True}),
        ("none", {"softcap": 10.0, "alibi": True}),
        ("bottom_right", {"alibi": True, "window": (5, 5), "sinks": True, "softcap": 7.0}),
        ("none", {"bias": "hqk"}),
        ("top_left", {"bias": "bhqk", "window": (20, -1)}),
        ("bottom_right", {"bias": "qk", "window": (9, 30), "sinks": True}),
        ("none", {"bias": "bk", "softcap": 7.0}),
        ("bottom_right", {"bias": "hq", "alibi": True}),
    ],
)
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_options_of_packed_sequences_match_the_oracle(causal, options, dropout_p):
    sequences = ((63, 63), (0, 5), (17, 0), (70, 33))
    check_packed(kernels, sequences, 16, FP32, causal, dropout_p, 9, **options)


# Queries and keys of each sequence, and head dim.
PACKED_SHAPES = (
    (((63, 63), (0, 5), (17, 0), (70, 33)), 40),
    (((1, 113), (111, 63)), 80),
)
PACKED_OPTIONS = {
    name: OPTIONS[name] for name in ("causal", "window", "softcap", "alibi", "sinks", "dropout_p")
} | {"bias": ("", "hqk", "bk")}
PACKED_MATRIX = cases(
    {"dtype": (BF16, FP16, FP32), "shape": PACKED_SHAPES, **PACKED_OPTIONS},
    options=tuple(PACKED_OPTIONS),
)


@pytest.mark.parametrize("case", PACKED_MATRIX, ids=case_name)
def test_any_two_options_of_packed_sequences_match_the_oracle(case):
    sequences, head_dim = case["shape"]
    options = {name: case[name] for name in PACKED_OPTIONS if name not in ("causal", "dropout_p")}
    given = (sequences, head_dim, case["dtype"], case["causal"], case["dropout_p"], 3)
    check_packed(kernels, *given, **options)


@pytest.mark.parametrize(("head_dim", "dtype"), [(40, FP16), (64, BF16), (128, BF16)])
def test_a_bias_of_packed_sequences_in_half_precision(head_dim, dtype):
    sequences = ((200, 130), (5, 1), (64, 257))
    check_packed(kernels, sequences, head_dim, dtype, "none", 0.0, 3, bias="hqk")


@pytest.mark.parametrize("window", [(-1, -1), (40, 9)])
def test_sinks_of_one_query_are_as_exact_as_plain_maths(window):
    """No other row cancels the rounding of its output, which delta is made of."""
    case = Case(
        (2, 1), (1, 257), 80, BF16, "none", 0.2, (50, 0), batch=2, window=window, sinks=True
    )
    check_dense(kernels, case)


def test_a_bias_may_forbid_keys_and_rows():
    """Minus infinity in a bias is a mask: no NaN anywhere."""
    torch.manual_seed(0)
    q, k, v, dout = (torch.randn(1, 1, 70, 16) for _ in range(4))
    bias = torch.zeros(70, 70).masked_fill(torch.rand(70, 70) < 0.5, -torch.inf)
    bias[3] = -torch.inf
    bias[:, :32] = -torch.inf
    masks = (bias, None, None, None, None)
    options = (None, "none", -1, -1, 0.0, 0.25, 0.0)
    out, lse = kernels.attention_forward(q, k, v, *masks, *options)
    grads = kernels.attention_backward(dout, None, q, k, v, out, lse, *masks, *options, True)
    assert not out[0, 0, 3].any()
    assert lse[0, 0, 3] == -torch.inf
    exact = torch.nn.functional.scaled_dot_product_attention(
        *(x.double() for x in (q, k, v)), attn_mask=bias.double(), scale=0.25
    )
    rows = torch.arange(70) != 3
    torch.testing.assert_close(out[:, :, rows].double(), exact[:, :, rows], rtol=0, atol=1e-5)
    for grad in grads[:4]:
        assert grad.isfinite().all()
    assert not grads[0][0, 0, 3].any()
    assert not grads[3][bias == -torch.inf].any()


def test_a_bias_may_be_expanded_transposed_and_of_another_dtype():
    torch.manual_seed(0)
    q, k, v, dout = (torch.randn(2, 2, 33, 16) for _ in range(4))
    plain = torch.randn(2, 1, 33, 33)
    options = (None, "none", -1, -1, 0.0, 0.25, 0.0)
    results = []
    for bias in (plain, plain.mT.contiguous().mT, plain.double()):
        masks = (bias, None, None, None, None)
        out, lse = kernels.attention_forward(q, k, v, *masks, *options)
        grads = kernels.attention_backward(dout, None, q, k, v, out, lse, *masks, *options, True)
        assert grads[3].dtype == bias.dtype
        results.append((out, grads[3].float()))
    for out, dbias in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(dbias, results[0][1])
    expanded = plain[:, :, :1].expand(2, 2, 33, 33)
    masks = (expanded, None, None, None, None)
    out, lse = kernels.attention_forward(q, k, v, *masks, *options)
    *_, dbias, _ = kernels.attention_backward(dout, None, q, k, v, out, lse, *masks, *options, True)
    assert dbias.shape == expanded.shape


def test_every_result_repeats_to_the_last_bit():
    torch.manual_seed(0)
    q, k, v, dout = (torch.randn(2, 2, 40, 16).to(BF16) for _ in range(4))
    masks = (torch.randn(2, 40, 40), None, None, torch.rand(2), torch.randn(2))
    options = (torch.tensor(5), "top_left", 20, -1, 9.0, 0.25, 0.2)
    runs = []
    for _ in range(2):
        out, lse = kernels.attention_forward(q, k, v, *masks, *options)
        grads = kernels.attention_backward(dout, lse, q, k, v, out, lse, *masks, *options, True)
        runs.append((out, lse, *grads))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("sinks", [False, True])
def test_no_keys_at_all(sinks):
    q, k = torch.ones(2, 2, 5, 16), torch.ones(2, 1, 0, 16)
    sink = torch.tensor([1.0, -2.0]) if sinks else None
    masks = (torch.zeros(5, 0), None, None, None, sink)
    options = (None, "none", -1, -1, 0.0, 1.0, 0.0)
    out, lse = kernels.attention_forward(q, k, k, *masks, *options)
    dlse = torch.ones_like(lse)
    grads = kernels.attention_backward(q, dlse, q, k, k, out, lse, *masks, *options, True)
    assert not out.any()
    expected = torch.full((2,), -torch.inf) if sink is None else sink
    assert torch.equal(lse, expected[None, :, None].expand(2, 2, 5))
    assert not grads[0].any()
    assert grads[3].shape == (5, 0)
    if sinks:
        assert torch.equal(grads[4], torch.tensor([10.0, 10.0]))
