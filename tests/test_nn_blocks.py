"""Feed-forward, normalisation and loss modules against plain PyTorch."""

import pytest
import torch
import torch.nn.functional as F

import fuseformer as ff
from fuseformer.nn.feed_forward import activation_name

DTYPE = torch.float64


def data(*shape):
    torch.manual_seed(0)
    return torch.randn(*shape, dtype=DTYPE)


@pytest.mark.parametrize(
    ("name", "function"), [("relu", F.relu), ("gelu", F.gelu), ("silu", F.silu)]
)
def test_feed_forward(name, function):
    block, x = ff.nn.FeedForward(6, 10, name, dtype=DTYPE), data(2, 3, 6)
    torch.testing.assert_close(block(x), block.linear2(function(block.linear1(x))))


def test_gated_feed_forward():
    block, x = ff.nn.GatedFeedForward(6, 10, dtype=DTYPE), data(2, 3, 6)
    expected = block.down_proj(F.silu(block.gate_proj(x)) * block.up_proj(x))
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize("bias", [True, False])
def test_add_layer_norm(bias):
    block, x = ff.nn.AddLayerNorm(6, eps=1e-3, bias=bias, dtype=DTYPE), data(2, 4, 6)
    plain = torch.nn.LayerNorm(6, eps=1e-3, bias=bias, dtype=DTYPE)
    block.load_state_dict(plain.state_dict(), strict=True)
    torch.testing.assert_close(block(x, x + 1), plain(2 * x + 1))


def test_add_rms_norm():
    block, x = ff.nn.AddRMSNorm(6, dtype=DTYPE), data(2, 4, 6)
    y, total = block(x, x + 1)
    torch.testing.assert_close(total, 2 * x + 1)
    torch.testing.assert_close(y, F.rms_norm(total, (6,), block.weight, 1e-6))


def test_dropout_stops_in_eval():
    x = data(2, 4, 6)
    norm = ff.nn.AddLayerNorm(6, dropout=0.5, dtype=DTYPE)
    assert not torch.equal(norm(x, x), norm(x, x))
    assert torch.equal(norm.eval()(x, x), norm(x, x))
    block = ff.nn.FeedForward(6, 10, dropout=0.5, dtype=DTYPE)
    assert not torch.equal(block(x), block(x))
    assert torch.equal(block.eval()(x), block(x))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_linear_cross_entropy(reduction):
    options = {"reduction": reduction, "label_smoothing": 0.1, "ignore_index": 3}
    loss = ff.nn.LinearCrossEntropy(6, 9, bias=True, **options)
    penalised = ff.nn.LinearCrossEntropy(6, 9, bias=True, z_loss=0.1, **options)
    penalised.load_state_dict(loss.state_dict())
    hidden, target = data(8, 6).float(), torch.arange(8)
    expected = F.cross_entropy(F.linear(hidden, loss.weight, loss.bias), target, **options)
    torch.testing.assert_close(loss(hidden, target), expected)
    squares = F.linear(hidden, loss.weight, loss.bias).logsumexp(-1)[target != 3].square()
    if reduction != "none":
        extra = penalised(hidden, target) - expected
        torch.testing.assert_close(extra, 0.1 * getattr(squares, reduction)())


def test_activation_names():
    for function, name in (
        (F.relu, "relu"),
        (torch.nn.ReLU(), "relu"),
        (torch.nn.GELU("tanh"), "gelu_tanh"),
        (torch.nn.GELU(), "gelu"),
        (torch.nn.SiLU(), "silu"),
        (torch.tanh, None),
    ):
        assert activation_name(function) == name


def test_bad_options_name_the_argument():
    with pytest.raises(ValueError, match=r"^activation: got"):
        ff.nn.FeedForward(6, 10, "swoosh")
    with pytest.raises(ValueError, match=r"^activation: got"):
        ff.nn.GatedFeedForward(6, 10, "swoosh")
    with pytest.raises(ValueError, match=r"^dropout: got"):
        ff.nn.FeedForward(6, 10, dropout=-1.0)
    with pytest.raises(ValueError, match=r"^reduction: got"):
        ff.nn.LinearCrossEntropy(6, 9, reduction="median")
    with pytest.raises(ValueError, match=r"^z_loss: got"):
        ff.nn.LinearCrossEntropy(6, 9, z_loss=-1e-4)
