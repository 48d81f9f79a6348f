"""Encoder, decoder and Transformer against `torch.nn`: values, gradients, masks, weights."""

import copy
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F

import fuseformer as ff

pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
WIDTH, HEADS, HIDDEN, BATCH, SOURCE, TARGET = 12, 3, 20, 2, 6, 5
STACK = {"num_encoder_layers": 2, "num_decoder_layers": 2}


def pair(name, *arguments, **options):
    built = []
    for package in (torch.nn, ff.nn):
        torch.manual_seed(0)
        built.append(getattr(package, name)(*arguments, dtype=torch.float64, **options))
    return built


def layers(name, **options):
    return pair(name, WIDTH, HEADS, HIDDEN, 0.0, **options)


def run(module, inputs, **call):
    inputs = [x.clone().requires_grad_() for x in inputs]
    out = module(*inputs, **call)
    module.zero_grad()
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)).sum().backward()
    return [out, *(x.grad for x in inputs), *(p.grad for p in module.parameters())]


def tensors(batch_first):
    torch.manual_seed(1)
    x = [torch.randn(BATCH, n, WIDTH, dtype=torch.float64) for n in (SOURCE, TARGET)]
    return x if batch_first else [t.transpose(0, 1) for t in x]


def padding(length):
    mask = torch.zeros(BATCH, length, dtype=torch.bool)
    mask[1, length - 2 :] = True
    return mask


def square(length, dtype=torch.float64):
    return torch.nn.Transformer.generate_square_subsequent_mask(length, dtype=dtype)


@pytest.mark.parametrize("activation", ["relu", "gelu", F.silu, torch.tanh])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_encoder_layer(activation, norm_first, bias):
    options = {"activation": activation, "norm_first": norm_first, "bias": bias}
    theirs, ours = layers("TransformerEncoderLayer", layer_norm_eps=1e-3, **options)
    source = tensors(False)[:1]
    torch.testing.assert_close(run(ours, source), run(theirs, source))


@pytest.mark.parametrize(
    ("norm_first", "batch_first"), list(itertools.product([False, True], repeat=2))
)
@pytest.mark.filterwarnings("ignore:Support for mismatched")
def test_transformer_with_masks(norm_first, batch_first):
    options = {"norm_first": norm_first, "batch_first": batch_first, "activation": "gelu", **STACK}
    theirs, ours = pair("Transformer", WIDTH, HEADS, dim_feedforward=HIDDEN, dropout=0.0, **options)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    inputs = tensors(batch_first)
    causal, padded = square(TARGET), padding(SOURCE)
    memory_mask = torch.zeros(TARGET, SOURCE, dtype=torch.bool).index_fill(
        1, torch.tensor([1]), True
    )
    calls = [
        {},
        {"tgt_mask": causal},
        {"tgt_mask": causal, "tgt_is_causal": True, "memory_mask": memory_mask},
        {
            "src_mask": square(SOURCE),
            "tgt_mask": causal == -torch.inf,
            "src_key_padding_mask": padded,
            "memory_key_padding_mask": padded,
            "tgt_key_padding_mask": padding(TARGET),
        },
    ]
    for call in calls:
        torch.testing.assert_close(run(ours, inputs, **call), run(theirs, inputs, **call))


def test_unbatched_transformer():
    theirs, ours = pair("Transformer", WIDTH, HEADS, dim_feedforward=HIDDEN, dropout=0.0, **STACK)
    inputs = [x[:, 0] for x in tensors(False)]
    call = {"src_key_padding_mask": padding(SOURCE)[1], "tgt_mask": square(TARGET)}
    torch.testing.assert_close(run(ours, inputs, **call), run(theirs, inputs, **call))


def test_detected_causal_mask_runs_without_a_bias():
    _, layer = layers("TransformerEncoderLayer", batch_first=True)
    encoder = ff.nn.TransformerEncoder(layer, 2)
    with ff.explain() as decisions:
        encoder(tensors(True)[0], mask=square(SOURCE))
    attentions = [d for d in decisions.decisions if d.request.op == "attention"]
    assert attentions
    assert all(not d.request.options for d in attentions)


def test_padding_in_eval_keeps_the_shape_and_equals_training():
    _, layer = layers("TransformerEncoderLayer", batch_first=True)
    encoder = ff.nn.TransformerEncoder(layer, 2, torch.nn.LayerNorm(WIDTH, dtype=torch.float64))
    source, mask = tensors(True)[0], padding(SOURCE)
    trained = encoder(source, src_key_padding_mask=mask)
    with torch.inference_mode():
        evaluated = encoder.eval()(source, src_key_padding_mask=mask)
    torch.testing.assert_close(evaluated, trained)


def test_fully_masked_sequence_stays_finite():
    _, ours = pair("Transformer", WIDTH, HEADS, dim_feedforward=HIDDEN, batch_first=True, **STACK)
    mask = torch.tensor([[False] * SOURCE, [True] * SOURCE])
    call = {"src_key_padding_mask": mask, "memory_key_padding_mask": mask}
    assert all(t.isfinite().all() for t in run(ours, tensors(True), **call))


def test_dropout_follows_the_seed_and_stops_in_eval():
    layer = ff.nn.TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, 0.5, dtype=torch.float64)
    source = tensors(False)[0]
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        results.append(layer(source))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    layer.eval()
    assert torch.equal(layer(source), layer(source))


def test_copies_and_pickles_keep_their_class():
    _, ours = pair("Transformer", WIDTH, HEADS, dim_feedforward=HIDDEN, dropout=0.0, **STACK)
    inputs = tensors(False)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(other.decoder.layers[1].multihead_attn) is ff.nn.MultiheadAttention
        torch.testing.assert_close(other(*inputs), ours(*inputs), rtol=0, atol=0)
    assert isinstance(ours, torch.nn.Transformer)
    assert isinstance(ours.encoder.layers[0], torch.nn.TransformerEncoderLayer)


def test_autocast_runs_in_its_dtype():
    layer = ff.nn.TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, 0.0)
    source = tensors(False)[0].float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(source)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_compiles_whole():
    layer = ff.nn.TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, 0.0, batch_first=True)
    source, mask = tensors(True)[0].float(), padding(SOURCE)
    call = {"src_mask": square(SOURCE, torch.float32), "is_causal": True}
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    expected = run(layer, [source], src_key_padding_mask=mask, **call)
    torch.testing.assert_close(run(compiled, [source], src_key_padding_mask=mask, **call), expected)


def test_unknown_activation_and_wrong_width_raise():
    with pytest.raises(RuntimeError, match="relu/gelu"):
        ff.nn.TransformerEncoderLayer(WIDTH, HEADS, activation="swoosh")
    layer = ff.nn.TransformerDecoderLayer(WIDTH, HEADS, HIDDEN)
    with pytest.raises(ValueError, match=r"^query: got width"):
        layer(torch.zeros(TARGET, BATCH, WIDTH + 1), torch.zeros(SOURCE, BATCH, WIDTH))
