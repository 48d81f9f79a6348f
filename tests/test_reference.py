"""The oracle against PyTorch's own functions, and its gradients against finite differences."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F

from fuseformer import reference


def leaf(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("causal", ["none", "top_left"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (5, 1)])
@pytest.mark.parametrize(("sq", "sk"), [(7, 7), (5, 11), (11, 5)])
def test_attention_equals_sdpa(causal, heads, kv_heads, sq, sk):
    torch.manual_seed(0)
    q, k, v = leaf(2, heads, sq, 12), leaf(2, kv_heads, sk, 12), leaf(2, kv_heads, sk, 12)
    out, lse = reference.attention(q, k, v, causal=causal)
    expected = F.scaled_dot_product_attention(
        q, k, v, is_causal=causal == "top_left", enable_gqa=True
    )
    torch.testing.assert_close(out, expected)
    logits = q @ k.repeat_interleave(heads // kv_heads, 1).mT / math.sqrt(12)
    if causal == "top_left":
        logits = logits.masked_fill(~torch.ones(sq, sk, dtype=torch.bool).tril(), -math.inf)
    torch.testing.assert_close(lse, logits.logsumexp(-1))


def test_bottom_right_window_and_alibi_positions():
    q, k = torch.zeros(1, 1, 3, 4, dtype=torch.float64), torch.zeros(1, 1, 5, 4).double()
    v = torch.eye(5, dtype=torch.float64)[None, None]
    v = F.pad(v, (0, 0))
    q, k = torch.zeros(1, 1, 3, 5).double(), torch.zeros(1, 1, 5, 5).double()
    seen = reference.attention(q, k, v, causal="bottom_right")[0][0, 0] > 0
    assert seen.int().tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    seen = reference.attention(q, k, v, window=(1, 2))[0][0, 0] > 0
    assert seen.int().tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [0, 1, 1, 1, 1]]
    seen = reference.attention(q, k, v, causal="bottom_right", window=(1, -1))[0][0, 0] > 0
    assert seen.int().tolist() == [[0, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 1, 1]]
    slopes = torch.tensor([0.5], dtype=torch.float64)
    weights = reference.attention(q, k, v, causal="bottom_right", alibi_slopes=slopes)[0][0, 0]
    distance = torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(weights[0, :3], torch.softmax(-0.5 * distance, 0))


def test_with_lengths_the_diagonal_ends_at_the_last_key_that_counts():
    q, k = torch.zeros(3, 1, 3, 5).double(), torch.zeros(3, 1, 5, 5).double()
    v = torch.eye(5, dtype=torch.float64).expand(3, 1, 5, 5)
    call = {"causal": "bottom_right", "key_lengths": torch.tensor([4, 2, 9])}
    seen = (reference.attention(q, k, v, **call)[0][:, 0] > 0).int().tolist()
    assert seen[0] == [[1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]
    assert seen[1] == [[0, 0, 0, 0, 0], [1, 0, 0, 0, 0], [1, 1, 0, 0, 0]]
    assert seen[2] == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]  # Sk bounds a length
    seen = (reference.attention(q, k, v, window=(0, -1), **call)[0][:2, 0] > 0).int().tolist()
    assert seen[0] == [[0, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0]]
    assert seen[1] == [[0, 0, 0, 0, 0], [1, 0, 0, 0, 0], [0, 1, 0, 0, 0]]
    # A padding mask hides keys and moves no diagonal, with lengths or without them.
    mask = torch.tensor([[False, True, False, True, True]]).expand(3, 5)
    seen = reference.attention(q, k, v, key_padding_mask=mask, **call)[0][0, 0] > 0
    assert seen.int().tolist() == [[1, 0, 0, 0, 0], [1, 0, 1, 0, 0], [1, 0, 1, 0, 0]]
    seen = reference.attention(q, k, v, causal="bottom_right", key_padding_mask=mask)[0][0, 0] > 0
    assert seen.int().tolist() == [[1, 0, 1, 0, 0]] * 3
    # Top-left, lengths only hide.
    seen = reference.attention(q, k, v, **call | {"causal": "top_left"})[0][1, 0] > 0
    assert seen.int().tolist() == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 0, 0, 0]]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": "bottom_right"},
        {"causal": "top_left", "window": (2, -1)},
        {"softcap": 2.0},
        {"dropout_p": 0.4, "seed": torch.tensor(5)},
        {"key_lengths": torch.tensor([0, 3])},
        {"key_lengths": torch.tensor([2, 3]), "causal": "bottom_right"},
        {"key_padding_mask": torch.tensor([[True] * 4, [False, True, False, True]])},
    ],
    ids=str,
)
def test_attention_gradcheck(options):
    torch.manual_seed(1)
    q, k, v = leaf(2, 4, 3, 5), leaf(2, 2, 4, 5), leaf(2, 2, 4, 5)

    def outputs(q, k, v):
        out, lse = reference.attention(q, k, v, **options)
        return out, lse[lse.isfinite()]

    assert torch.autograd.gradcheck(outputs, (q, k, v))


def test_attention_gradcheck_of_bias_sinks_and_slopes():
    torch.manual_seed(2)
    q, k, v = leaf(2, 2, 3, 4), leaf(2, 2, 4, 4), leaf(2, 2, 4, 4)
    bias, sinks, slopes = leaf(1, 2, 3, 4), leaf(2), leaf(2)

    def outputs(q, k, v, bias, sinks, slopes):
        return reference.attention(q, k, v, bias=bias, sinks=sinks, alibi_slopes=slopes)

    assert torch.autograd.gradcheck(outputs, (q, k, v, bias, sinks, slopes))


def test_rows_that_see_nothing_give_zero_and_no_gradient():
    q, k, v = leaf(2, 2, 3, 4), leaf(2, 2, 5, 4), leaf(2, 2, 5, 4)
    out, lse = reference.attention(q, k, v, key_lengths=torch.tensor([0, 5]))
    assert (out[0] == 0).all()
    assert (lse[0] == -math.inf).all()
    out.sum().backward()
    for x in (q, k, v):
        assert (x.grad[0] == 0).all()
        assert x.grad[1].isfinite().all()


def test_varlen_equals_dense_sequences():
    torch.manual_seed(3)
    q, k, v = leaf(9, 4, 6), leaf(11, 2, 6), leaf(11, 2, 6)
    cu_q, cu_k = torch.tensor([0, 4, 4, 9]).int(), torch.tensor([0, 3, 6, 11]).int()
    out, lse = reference.varlen_attention(q, k, v, cu_q, cu_k, causal="bottom_right")
    for n in range(3):
        rows, cols = slice(cu_q[n], cu_q[n + 1]), slice(cu_k[n], cu_k[n + 1])
        part, part_lse = reference.attention(
            *(x.transpose(0, 1)[None] for x in (q[rows], k[cols], v[cols])), causal="bottom_right"
        )
        torch.testing.assert_close(out[rows], part[0].transpose(0, 1))
        torch.testing.assert_close(lse[:, rows], part_lse[0])


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_feed_forward_equals_torch_and_gradcheck(activation):
    torch.manual_seed(4)
    x, w1, b1, w2, b2 = leaf(3, 4), leaf(6, 4), leaf(6), leaf(5, 6), leaf(5)
    act = {
        "relu": F.relu,
        "gelu": F.gelu,
        "silu": F.silu,
        "gelu_tanh": lambda t: F.gelu(t, approximate="tanh"),
    }[activation]
    y = reference.feed_forward(x, w1, b1, w2, b2, activation=activation)
    torch.testing.assert_close(y, F.linear(act(F.linear(x, w1, b1)), w2, b2))
    seed = torch.tensor(9)
    assert torch.autograd.gradcheck(
        lambda *t: reference.feed_forward(*t, activation=activation, dropout_p=0.3, seed=seed),
        (x, w1, b1, w2, b2),
    )
    gate, up, down = leaf(6, 4), leaf(6, 4), leaf(5, 6)
    y = reference.gated_feed_forward(x, gate, up, down, activation=activation)
    torch.testing.assert_close(y, (act(x @ gate.T) * (x @ up.T)) @ down.T)


def test_norms_gradcheck():
    torch.manual_seed(5)
    x, residual, weight, bias = leaf(3, 5), leaf(3, 5), leaf(5), leaf(5)
    layer = F.layer_norm(x + residual, (5,), weight, bias, 1e-5)
    rms = F.rms_norm(x + residual, (5,), weight, 1e-5)
    for expected, shift in ((layer, bias), (rms, None)):
        options = {"rms": shift is None, "eps": 1e-5}
        inputs = (x, residual, weight, shift)
        (y,) = reference.add_norm(*inputs, return_residual=False, **options)
        torch.testing.assert_close(y, expected)
        y, total = reference.add_norm(*inputs, return_residual=True, **options)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(total, x + residual)
        options |= {"dropout_p": 0.3, "seed": torch.tensor(2)}
        for pre in (False, True):
            function = functools.partial(reference.add_norm, return_residual=pre, **options)
            assert torch.autograd.gradcheck(function, inputs)


def test_the_returned_residual_is_normalised_as_rounded():
    torch.manual_seed(5)
    x, residual = torch.randn(2, 9, 40, dtype=torch.bfloat16).unbind()
    weight = torch.ones(40)
    y, total = reference.add_norm(
        x, residual, weight, None, rms=True, return_residual=True, eps=1e-6
    )
    assert torch.equal(y, F.rms_norm(total.float(), (40,), weight, 1e-6).bfloat16())
    (post,) = reference.add_norm(
        x, residual, weight, None, rms=True, return_residual=False, eps=1e-6
    )
    exact = F.rms_norm(x.float() + residual.float(), (40,), weight, 1e-6).bfloat16()
    assert torch.equal(post, exact)
    assert not torch.equal(post, y)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_linear_cross_entropy_equals_torch(reduction):
    torch.manual_seed(6)
    hidden, weight, bias = leaf(7, 4), leaf(9, 4), leaf(9)
    target = torch.tensor([0, 8, -100, 3, 3, -100, 1])
    options = {"label_smoothing": 0.1, "reduction": reduction}
    loss = reference.linear_cross_entropy(hidden, weight, target, bias, softcap=3.0, **options)
    logits = 3 * torch.tanh((hidden @ weight.T + bias) / 3)
    torch.testing.assert_close(loss, F.cross_entropy(logits, target, **options))


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_z_loss_adds_the_squared_lse_of_supervised_rows(reduction):
    torch.manual_seed(6)
    hidden, weight, bias = leaf(7, 4), leaf(9, 4), leaf(9)
    target = torch.tensor([0, 8, -1, 3, 3, -1, 1])
    options = {"softcap": 3.0, "label_smoothing": 0.1, "ignore_index": -1, "reduction": reduction}

    def call(hidden, weight, bias, z_loss=0.2):
        return reference.linear_cross_entropy(
            hidden, weight, target, bias, z_loss=z_loss, **options
        )

    lse = (3 * torch.tanh((hidden @ weight.T + bias) / 3)).logsumexp(-1)
    squares = torch.where(target == -1, 0.0, lse**2)
    total = {"none": squares, "sum": squares.sum(), "mean": squares.sum() / 5}[reduction]
    plain = call(hidden, weight, bias, 0.0)
    torch.testing.assert_close(call(hidden, weight, bias), plain + 0.2 * total)
    assert torch.autograd.gradcheck(call, (hidden, weight, bias))


def test_rotary_turns_pairs_and_keeps_the_rest():
    torch.manual_seed(7)
    q = torch.randn(2, 3, 5, 10, dtype=torch.float64)
    angle = torch.rand(5, 4, dtype=torch.float64)
    turned = reference.rotate(q, angle.cos(), angle.sin())
    z = torch.complex(q[..., :4], q[..., 4:8]) * torch.polar(torch.ones_like(angle), angle)
    torch.testing.assert_close(turned, torch.cat([z.real, z.imag, q[..., 8:]], -1))
    torch.testing.assert_close(reference.rotate(turned, angle.cos(), angle.sin(), inverse=True), q)
    pairs = reference.rotate(q, angle.cos(), angle.sin(), interleaved=True)
    z = torch.view_as_complex(q[..., :8].unflatten(-1, (4, 2)).contiguous())
    z = torch.view_as_real(z * torch.polar(torch.ones_like(angle), angle)).flatten(-2)
    torch.testing.assert_close(pairs, torch.cat([z, q[..., 8:]], -1))
    back = reference.rotate(pairs, angle.cos(), angle.sin(), inverse=True, interleaved=True)
    torch.testing.assert_close(back, q)
