"""Encoder, decoder and Transformer against torch.nn; the block modules against their ops."""

import copy

import fuseformer as ff
import pytest
import torch
import torch.nn.functional as F

SIZES = {"d_model": 16, "nhead": 4, "dim_feedforward": 24, "dropout": 0.0, "dtype": torch.float64}


def twins(name, *args, **options):
    """Return torch's module and ours, built from one seed, with their weights checked equal."""
    modules = []
    for package in (torch.nn, ff.nn):
        torch.manual_seed(0)
        modules.append(getattr(package, name)(*args, **options).train())
    theirs, ours = modules
    assert list(theirs.state_dict()) == list(ours.state_dict())
    for a, b in zip(theirs.parameters(), ours.parameters(), strict=True):
        assert torch.equal(a, b)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    return theirs, ours


def check(theirs, ours, inputs, **arguments):
    results = []
    for module in (ours, theirs):
        leaves = [t.clone().requires_grad_() for t in inputs]
        torch.manual_seed(1)
        out = module(*leaves, **arguments)
        loss = (out * torch.randn(out.shape, dtype=out.dtype)).sum()
        results.append([out, *torch.autograd.grad(loss, [*leaves, *module.parameters()])])
    for a, e in zip(*results, strict=True):
        torch.testing.assert_close(a, e)


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu", F.silu, torch.tanh], ids=str)
def test_layers_equal_torch(norm_first, batch_first, bias, activation):
    options = SIZES | {
        "norm_first": norm_first,
        "batch_first": batch_first,
        "bias": bias,
        "activation": activation,
    }
    x, memory = normal(2, 6, 16), normal(2, 8, 16)
    if not batch_first:
        x, memory = x.transpose(0, 1), memory.transpose(0, 1)
    pad = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    memory_pad = torch.tensor([[False] * 3 + [True] * 5, [False] * 8])
    causal = torch.nn.Transformer.generate_square_subsequent_mask(6, dtype=torch.float64)
    encoders = twins("TransformerEncoderLayer", **options)
    check(*encoders, [x])
    check(*encoders, [x], src_mask=causal, is_causal=True)
    pad_float = torch.zeros(2, 6, dtype=torch.float64).masked_fill(pad, -torch.inf)
    check(*encoders, [x], src_mask=causal, src_key_padding_mask=pad_float)
    decoders = twins("TransformerDecoderLayer", **options)
    check(*decoders, [x, memory])
    check(
        *decoders,
        [x, memory],
        tgt_mask=causal,
        tgt_is_causal=True,
        tgt_key_padding_mask=pad_float,
        memory_key_padding_mask=memory_pad,
        memory_mask=normal(8, 6, 8),
    )


@pytest.mark.parametrize("batch_first", [False, True])
def test_transformer_equals_torch(batch_first):
    theirs, ours = twins(
        "Transformer",
        num_encoder_layers=2,
        num_decoder_layers=2,
        batch_first=batch_first,
        **SIZES,
    )
    assert type(ours.encoder) is ff.nn.TransformerEncoder
    assert type(ours.decoder.layers[1]) is ff.nn.TransformerDecoderLayer
    assert type(ours.decoder.layers[1].multihead_attn) is ff.nn.MultiheadAttention
    src, tgt = normal(2, 7, 16), normal(2, 5, 16)
    if not batch_first:
        src, tgt = src.transpose(0, 1), tgt.transpose(0, 1)
    mask = torch.nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
    pad = torch.tensor([[False] * 7, [False] * 3 + [True] * 4])
    check(theirs, ours, [src, tgt])
    check(
        theirs,
        ours,
        [src, tgt],
        tgt_mask=mask,
        src_key_padding_mask=pad,
        memory_key_padding_mask=pad,
    )
    for module in (theirs, ours):
        module.eval()
    torch.testing.assert_close(
        ours(src[:, 0] if not batch_first else src[0], tgt[:, 0] if not batch_first else tgt[0]),
        theirs(src[:, 0] if not batch_first else src[0], tgt[:, 0] if not batch_first else tgt[0]),
    )


def test_stacks_find_the_causal_mask():
    _, layer = twins("TransformerEncoderLayer", batch_first=True, **SIZES)
    stack = ff.nn.TransformerEncoder(layer, 2)
    x = normal(2, 6, 16)
    causal = torch.nn.Transformer.generate_square_subsequent_mask(6)
    for mask, expected in (
        (causal, []),
        (causal == -torch.inf, []),
        (causal.tril(-1) * 0, ["bias"]),
    ):
        with ff.explain() as decisions:
            stack(x, mask=mask)
        attention = [d for d in decisions.decisions if d.request.op == "attention"]
        assert [sorted(d.request.options) for d in attention] == [expected] * len(attention)


def test_a_wholly_padded_sequence_stays_finite_in_training():
    layer = ff.nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)
    x = torch.randn(2, 5, 16, requires_grad=True)
    out = layer(x, src_key_padding_mask=torch.tensor([[True] * 5, [False] * 5]))
    out.sum().backward()
    assert out.isfinite().all()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_encoder_layer_compiles_without_graph_breaks():
    _, layer = twins("TransformerEncoderLayer", batch_first=True, **SIZES)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = normal(2, 6, 16).requires_grad_()
    pad = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    out, expected = compiled(x, src_key_padding_mask=pad), layer(x, src_key_padding_mask=pad)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(
        torch.autograd.grad(out.sum(), x), torch.autograd.grad(expected.sum(), x)
    )


def test_dropout_is_drawn_from_the_generator():
    layer = ff.nn.TransformerEncoderLayer(16, 4, 24, dropout=0.5, batch_first=True)
    x = torch.randn(2, 6, 16)
    torch.manual_seed(0)
    first, second = layer(x), layer(x)
    torch.manual_seed(0)
    assert torch.equal(first, layer(x))
    assert not torch.equal(first, second)
    layer.eval()
    assert torch.equal(layer(x), copy.deepcopy(layer)(x))


def test_block_modules():
    x, residual = torch.randn(2, 5, 16), torch.randn(2, 5, 16)
    block = ff.nn.FeedForward(16, 24, activation="gelu")
    torch.testing.assert_close(block(x), block.linear2(F.gelu(block.linear1(x))))
    gated = ff.nn.GatedFeedForward(16, 24)
    torch.testing.assert_close(gated(x), gated.down(F.silu(gated.gate(x)) * gated.up(x)))
    norm = ff.nn.AddLayerNorm(16)
    torch.testing.assert_close(norm(x, residual), F.layer_norm(x + residual, (16,)))
    y, total = ff.nn.AddRMSNorm(16)(x, residual)
    torch.testing.assert_close(total, x + residual)
    torch.testing.assert_close(y, F.rms_norm(x + residual, (16,), eps=1e-6))
    head = ff.nn.LinearCrossEntropy(16, 30, softcap=5.0)
    target = torch.randint(0, 30, (2, 5))
    torch.testing.assert_close(
        head(x, target), F.cross_entropy(head(x).flatten(0, 1), target.flatten())
    )
    for module in (ff.nn.FeedForward(16, 24, dropout=0.5), ff.nn.AddRMSNorm(16, dropout=0.5)):
        inputs = [x] if isinstance(module, ff.nn.FeedForward) else [x, residual]
        torch.manual_seed(0)
        trained = module(*inputs)
        module.eval()
        assert not torch.equal(trained[0], module(*inputs)[0])
