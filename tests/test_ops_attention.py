"""attention and varlen_attention: the CPU backend against the oracle, and the op contract."""

import math

import pytest
import torch
import torch._dynamo.testing
import torch.utils.checkpoint

import fuseformer as ff
from fuseformer.testing import assert_close_to_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [  # batch, heads, key heads, queries, keys, head dim
    (2, 6, 2, 63, 111, 40),
    (1, 5, 1, 113, 63, 72),
    (2, 2, 2, 3, 257, 96),
    (1, 2, 1, 257, 2, 80),
    (3, 4, 4, 17, 17, 8),
]
OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "bottom_right": {"causal": "bottom_right"},
    "lengths": {"key_lengths": True, "causal": True},
    "padding": {"key_padding_mask": True},
    "padding_causal": {"key_padding_mask": True, "causal": True},
    "bias": {"bias": True},
    "bottom_right_lengths": {"causal": "bottom_right", "key_lengths": True},
    "bottom_right_lengths_all": {
        "causal": "bottom_right",
        "key_lengths": True,
        "key_padding_mask": True,
        "bias": True,
        "window": (9, -1),
        "alibi_slopes": True,
    },
    "window": {"window": (9, 3), "causal": "bottom_right"},
    "window_both": {"window": (9, 3)},
    "softcap_alibi_sinks": {"softcap": 2.0, "alibi_slopes": True, "sinks": True},
    "dropout": {"dropout_p": 0.25, "seed": 12},
    "dropout_causal_lengths": {"dropout_p": 0.25, "seed": 12, "causal": True, "key_lengths": True},
}


def build_options(options, shape):
    batch, heads, _, sq, sk, _ = shape
    made = {
        "key_lengths": lambda: torch.tensor([sk // 2, 0, sk][:batch], dtype=torch.int32),
        "key_padding_mask": lambda: torch.rand(batch, sk) < torch.tensor([[0.5], [2], [0]])[:batch],
        "bias": lambda: torch.randn(1, heads, sq, sk),
        "alibi_slopes": lambda: torch.rand(heads),
        "sinks": lambda: torch.randn(heads),
    }
    return {k: made[k]() if v is True and k in made else v for k, v in options.items()}


def run(backend, tensors, learned, options, dout, dlse):
    """Return out, lse and all gradients of one call."""
    q, k, v = (t.detach().clone().requires_grad_() for t in tensors)
    learned = {k: t.detach().clone().requires_grad_() for k, t in learned.items()}
    out, lse = ff.attention(q, k, v, backend=backend, return_lse=True, **options, **learned)
    finite = torch.where(lse.isfinite(), lse, 0.0)
    ((out * dout).sum() + (finite * dlse).sum()).backward()
    return [out, lse, q.grad, k.grad, v.grad, *(t.grad for t in learned.values())]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cpu_against_the_oracle(dtype, name, shape):
    if min(shape[3:5]) < 4 and dtype != torch.float32:
        # With so few keys the gradient of the logits cancels, and what is left is the rounding of
        # the output in delta = rowsum(out * dout), which autograd through softmax does not have.
        dtype = torch.float32
    torch.manual_seed(0)
    batch, heads, kv_heads, sq, sk, dim = shape
    options = build_options(OPTIONS[name], shape)
    learned = {k: options.pop(k) for k in ("bias", "sinks") if k in options}
    # Low-precision inputs laid out (batch, seq, heads, dim), which must cost no copy.
    tensors = [
        torch.randn(batch, s, h, dim).to(dtype).transpose(1, 2)
        for s, h in ((sq, heads), (sk, kv_heads), (sk, kv_heads))
    ]
    dout = torch.randn(batch, heads, sq, dim)
    dlse = torch.randn(batch, heads, sq) if name in ("causal", "dropout") else torch.zeros(1)
    wide = [t.double() for t in tensors]
    exact = run("reference", wide, {k: t.double() for k, t in learned.items()}, options, dout, dlse)
    low = run("reference", tensors, learned, options, dout.to(dtype), dlse)
    actual = run("cpu", tensors, learned, options, dout.to(dtype), dlse)
    names = ["out", "lse", "dq", "dk", "dv", *("d" + k for k in learned)]
    for what, a, e, b in zip(names, actual, exact, low, strict=True):
        assert_close_to_reference(a, e, b, factor=2 if what in ("out", "lse") else 3, name=what)
    assert actual[0].dtype == dtype
    assert actual[1].dtype == torch.float32


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("options", [{}, {"window": (20, -1), "alibi_slopes": torch.rand(4)}])
@pytest.mark.parametrize(("sq", "sk"), [(1, 257), (63, 113), (113, 63)])
def test_bottom_right_with_lengths_is_that_of_each_entry_alone(backend, options, sq, sk):
    """The keys past a length might as well not exist."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 4, sq, 16), torch.randn(3, 2, sk, 16), torch.randn(3, 2, sk, 16)
    lengths = torch.tensor([sk - 9, 0, sk])
    call = {"causal": "bottom_right", "return_lse": True, "backend": backend, **options}
    for x in (q, k, v):
        x.requires_grad_()
    together = ff.attention(q, k, v, key_lengths=lengths, **call)
    apart = [
        ff.attention(q[b, None], k[b, None, :, :n], v[b, None, :, :n], **call)
        for b, n in enumerate(lengths.tolist())
    ]
    dout = torch.randn(3, 4, sq, 16)
    for found, *expected in zip(together, *apart, strict=True):
        torch.testing.assert_close(found, torch.cat(expected), rtol=1e-5, atol=1e-5)
    gradients = [
        torch.autograd.grad(out, (q, k, v), dout)
        for out in (together[0], torch.cat([out for out, _ in apart]))
    ]
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("sq", "sk"), [(1, 1), (1, 257), (257, 1)])
@pytest.mark.parametrize("causal", [False, True])
def test_single_queries_and_keys(sq, sk, causal):
    """Where a row sees one key its dq and dk are exactly 0, which leaves low precision no slack."""
    torch.manual_seed(0)
    tensors = [torch.randn(2, 2, s, 40) for s in (sq, sk, sk)]
    dout = torch.randn(2, 2, sq, 40)
    wide = [t.double() for t in tensors]
    options, dlse = {"causal": causal}, torch.zeros(1)
    exact = run("reference", wide, {}, options, dout, dlse)
    low = run("reference", tensors, {}, options, dout, dlse)
    for a, e, b in zip(run("cpu", tensors, {}, options, dout, dlse), exact, low, strict=True):
        assert_close_to_reference(a, e, b)


@pytest.mark.parametrize("causal", [False, True, "bottom_right"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("bias", [None, (4, 6, 35, 31), (35, 1), (4, 1, 1, 31), (6, 1, 31)])
def test_varlen_cpu_against_the_oracle(causal, dropout_p, bias):
    torch.manual_seed(1)
    cu_q = torch.tensor([0, 5, 5, 40, 41], dtype=torch.int32)
    cu_k = torch.tensor([0, 7, 9, 40, 60], dtype=torch.int32)
    results = []
    tensors = [torch.randn(41, 6, 24), torch.randn(60, 2, 24), torch.randn(60, 2, 24)]
    tensors += [] if bias is None else [torch.randn(bias)]
    dout = torch.randn(41, 6, 24)
    runs = (("cpu", torch.float32), ("reference", torch.float64), ("reference", torch.float32))
    for backend, dtype in runs:
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in tensors]
        out, lse = ff.varlen_attention(
            *leaves[:3],
            cu_q,
            cu_k,
            35,
            31,
            causal=causal,
            bias=None if bias is None else leaves[3],
            dropout_p=dropout_p,
            seed=3,
            return_lse=True,
            backend=backend,
        )
        ((out * dout).sum() + torch.where(lse.isfinite(), lse, 0).sum()).backward()
        results.append((out, lse, *(leaf.grad for leaf in leaves)))
    for a, e, low in zip(*results, strict=True):
        assert_close_to_reference(a, e, low, factor=3)


def test_backends_draw_the_same_dropout_mask_and_manual_seed_governs_it():
    q = torch.randn(2, 3, 20, 64)
    k = torch.zeros(2, 3, 64, 64)
    v = torch.eye(64).expand(2, 3, 64, 64)  # with equal weights the output shows the mask
    kept = [
        ff.attention(q, k, v, dropout_p=0.5, seed=4, backend=b) > 0 for b in ("cpu", "reference")
    ]
    assert torch.equal(*kept)
    torch.manual_seed(8)
    first, second = (ff.attention(q, k, v, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(8)
    assert torch.equal(first, ff.attention(q, k, v, dropout_p=0.5))
    assert not torch.equal(first, second)


def test_checkpointing_repeats_the_mask():
    q, k, v = (torch.randn(1, 2, 16, 8, requires_grad=True) for _ in range(3))

    def attend(q, k, v):
        return ff.attention(q, k, v, dropout_p=0.5)

    torch.manual_seed(1)
    plain = torch.autograd.grad(attend(q, k, v).sum(), (q, k, v))
    torch.manual_seed(1)
    again = torch.utils.checkpoint.checkpoint(attend, q, k, v, use_reentrant=False)
    for a, b in zip(torch.autograd.grad(again.sum(), (q, k, v)), plain, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "options", [{}, {"dropout_p": 0.2, "seed": 1}, {"window": (2, 2)}], ids=str
)
@pytest.mark.parametrize("shape", [(0, 4, 4, 3, 3, 8), (2, 4, 4, 0, 3, 8), (2, 4, 4, 3, 0, 8)])
def test_empty_sizes(shape, options):
    batch, heads, kv_heads, sq, sk, dim = shape
    q = torch.randn(batch, heads, sq, dim, requires_grad=True)
    k, v = (torch.randn(batch, kv_heads, sk, dim, requires_grad=True) for _ in range(2))
    for backend in ("cpu", "reference"):
        out, lse = ff.attention(q, k, v, return_lse=True, backend=backend, **options)
        assert out.shape == q.shape
        assert (out == 0).all()
        assert (lse == -math.inf).all()
        for x, gradient in zip((q, k, v), torch.autograd.grad(out.sum(), (q, k, v)), strict=True):
            assert torch.equal(gradient, torch.zeros_like(x))


def test_rows_that_see_nothing_on_the_cpu():
    q, k, v = (torch.randn(2, 2, 6, 8, requires_grad=True) for _ in range(3))
    hidden = torch.tensor([[True] * 6, [True, True, False, False, False, False]])
    for options in ({}, {"causal": True}, {"window": (3, 3)}, {"dropout_p": 0.1}):
        out, lse = ff.attention(q, k, v, key_padding_mask=hidden, return_lse=True, **options)
        assert (out[0] == 0).all()
        assert (lse[0] == -math.inf).all()
        blind = 2 if options.get("causal") else 0
        assert (lse[1, :, :blind] == -math.inf).all()
        assert lse[1, :, blind:].isfinite().all()
        gradients = torch.autograd.grad(out.sum(), (q, k, v))
        assert all((g[0] == 0).all() and g.isfinite().all() for g in gradients)


def arguments(**options):
    q, k, v = (torch.randn(2, 2, 5, 8, requires_grad=True) for _ in range(3))
    named = {
        "bias": None,
        "key_padding_mask": None,
        "key_lengths": None,
        "alibi_slopes": None,
        "sinks": None,
        "seed": None,
        "causal": "none",
        "window_left": -1,
        "window_right": -1,
        "softcap": 0.0,
        "scale": 0.3,
        "dropout_p": 0.0,
    }
    return q, k, v, *(named | options).values(), "cpu"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": "top_left", "key_lengths": torch.tensor([3, 5], dtype=torch.int32)},
        {"bias": torch.randn(1, 2, 5, 5, requires_grad=True)},
        {"sinks": torch.randn(2, requires_grad=True), "softcap": 2.0, "window_left": 2},
        {"dropout_p": 0.5, "seed": torch.tensor(3)},
    ],
    ids=["plain", "lengths", "bias", "sinks", "dropout"],
)
def test_opcheck(options):
    torch.library.opcheck(torch.ops.fuseformer.attention.default, arguments(**options))


@pytest.mark.parametrize(
    "extras", [(None, None, None), (torch.zeros(2, 1, 5), None, torch.ones(2))]
)
def test_opcheck_varlen(extras):
    extras = [x if x is None else x.clone().requires_grad_() for x in extras]
    q, k, v = (torch.randn(9, 2, 8, requires_grad=True) for _ in range(3))
    cu = torch.tensor([0, 4, 9], dtype=torch.int32)
    torch.library.opcheck(
        torch.ops.fuseformer.varlen_attention.default,
        (q, k, v, cu, cu, 5, 5, *extras, None, "top_left", -1, -1, 0.0, 0.3, 0.0, "cpu"),
    )


def test_autocast_runs_in_its_dtype():
    q, k, v = (torch.randn(1, 2, 9, 8, requires_grad=True) for _ in range(3))
    for backend in (None, "reference"):
        with torch.autocast("cpu", torch.bfloat16):
            out = ff.attention(q, k.bfloat16(), v, backend=backend)
        assert out.dtype == torch.bfloat16
        out.sum().backward()
        assert q.grad.dtype == torch.float32


def test_memory_is_linear_in_the_sequence():
    def allocated(length):
        q, k, v = (torch.randn(1, 2, length, 16, requires_grad=True) for _ in range(3))
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
            ff.attention(q, k, v, dropout_p=0.1).sum().backward()
        live = peak = 0
        for event in profile.profiler.kineto_results.events():
            if event.name() == "[memory]":
                live += event.nbytes()
                peak = max(peak, live)
        return peak

    short, long = allocated(1024), allocated(8192)
    full_logits = 2 * 8192 * 8192 * 4
    assert long < full_logits / 4, (short, long)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": "text"}, TypeError, "q: got str"),
        ({"q": torch.zeros(2, 3, 4)}, ValueError, "q: got 3 dimensions"),
        ({"q": torch.zeros(2, 4, 5, 8, dtype=torch.int32)}, TypeError, "q: got dtype torch.int32"),
        ({"k": torch.zeros(2, 4, 7, 8).half()}, TypeError, "k: got dtype torch.float16"),
        ({"k": torch.zeros(1, 4, 7, 8)}, ValueError, "k: got batch size 1"),
        ({"v": torch.zeros(2, 4, 6, 8)}, ValueError, r"v: got shape \(2, 4, 6, 8\)"),
        (
            {"k": torch.zeros(2, 3, 7, 8), "v": torch.zeros(2, 3, 7, 8)},
            ValueError,
            "k: got 3 heads",
        ),
        ({"k": torch.zeros(2, 4, 7, 9), "v": torch.zeros(2, 4, 7, 9)}, ValueError, "head dim 9"),
        ({"k": torch.zeros(2, 4, 7, 8, device="meta")}, ValueError, "k: got device meta"),
        ({"q": torch.zeros(2, 4, 8, 5).mT}, ValueError, "q: got stride 5"),
        ({"key_padding_mask": torch.zeros(2, 5, dtype=torch.bool)}, ValueError, "key_padding_mask"),
        ({"key_padding_mask": torch.zeros(2, 7)}, TypeError, "key_padding_mask: got dtype"),
        ({"key_lengths": torch.zeros(3, dtype=torch.int32)}, ValueError, "key_lengths: got shape"),
        ({"bias": torch.zeros(3, 5, 7)}, ValueError, r"bias: got shape \(3, 5, 7\)"),
        ({"dropout_p": -0.1}, ValueError, "dropout_p: got -0.1"),
        ({"dropout_p": "half"}, TypeError, "dropout_p: got str"),
        ({"scale": math.nan}, ValueError, "scale: got nan"),
        ({"softcap": 0.0}, ValueError, "softcap: got 0.0"),
        ({"causal": "left"}, ValueError, "causal: got 'left'"),
        ({"window": (1, -2)}, ValueError, r"window: got \(1, -2\)"),
        ({"alibi_slopes": torch.zeros(3)}, ValueError, "alibi_slopes: got shape"),
        ({"sinks": torch.zeros(4, 1)}, ValueError, "sinks: got 2 dimensions"),
        ({"seed": 1.5, "dropout_p": 0.5}, TypeError, "seed: got float"),
        ({"backend": "metal"}, ValueError, "backend: got 'metal'"),
        ({"backend": "cuda"}, ValueError, "'cuda' cannot serve attention"),
    ],
)
def test_bad_input_names_the_argument(change, error, message):
    good = {
        "q": torch.zeros(2, 4, 5, 8),
        "k": torch.zeros(2, 4, 7, 8),
        "v": torch.zeros(2, 4, 7, 8),
    }
    with pytest.raises(error, match=message):
        ff.attention(**(good | change))


def test_varlen_offsets_are_checked():
    x = torch.zeros(6, 2, 8)
    good = torch.tensor([0, 6], dtype=torch.int32)
    for bad in ([0, 5], [1, 6], [0, 4, 2, 6]):
        offsets = torch.tensor(bad, dtype=torch.int32)
        with pytest.raises(ValueError, match="cu_seqlens_q: got"):
            ff.varlen_attention(x, x, x, offsets, offsets, 6, 6)
    with pytest.raises(TypeError, match=r"cu_seqlens_k: got dtype torch\.int64"):
        ff.varlen_attention(x, x, x, good, good.long(), 6, 6)
    with pytest.raises(ValueError, match="max_seqlen_k: got 5, expected at least the longest seq"):
        ff.varlen_attention(x, x, x, good, good, 6, 5)


def test_the_bias_of_packed_sequences_is_checked():
    x = torch.zeros(6, 2, 8)
    cu = torch.tensor([0, 2, 6], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"bias: got shape \(3, 4, 4\).* \(2, 2, 4, 4\)"):
        ff.varlen_attention(x, x, x, cu, cu, 4, 4, bias=torch.zeros(3, 4, 4))
    with pytest.raises(TypeError, match="bias: got list"):
        ff.varlen_attention(x, x, x, cu, cu, 4, 4, bias=[0.0])


def test_attention_weights_are_those_of_the_call():
    torch.manual_seed(2)
    q, k = torch.randn(2, 6, 9, 8), torch.randn(2, 2, 11, 8)
    v = torch.eye(11)[:, :8].expand(2, 2, 11, 8)
    lengths = torch.tensor([0, 7], dtype=torch.int32)
    options = {"causal": "bottom_right", "key_lengths": lengths, "bias": torch.randn(6, 9, 11)}
    out, lse = ff.attention(q, k, v, return_lse=True, **options)
    weights = ff.attention_weights(q, k, lse, heads=[4, 1], rows=[0, 8], **options)
    assert weights.shape == (2, 2, 2, 11)
    expected = out[:, [4, 1]][:, :, [0, 8]]
    assert_close_to_reference(weights[..., :8], expected, expected)
    assert (weights[0] == 0).all()


def test_second_derivatives_of_self_attention_count_a_shared_input_once():
    torch.manual_seed(0)
    x = torch.randn(1, 2, 5, 8, dtype=torch.float64, requires_grad=True)

    def penalty(attend) -> torch.Tensor:
        (gradient,) = torch.autograd.grad(attend(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), x)[0]

    ours = penalty(lambda x: ff.attention(x, x, x, causal=True))
    hidden = torch.ones(5, 5, dtype=torch.bool).triu(1)

    def plain_attention(x: torch.Tensor) -> torch.Tensor:
        logits = (x @ x.mT / 8**0.5).masked_fill(hidden, -math.inf)
        return logits.softmax(-1) @ x

    plain = penalty(plain_attention)
    torch.testing.assert_close(ours, plain)
