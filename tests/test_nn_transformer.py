"""Encoder, decoder and Transformer against `torch.nn`: values, gradients, masks, weights."""

import copy
import inspect
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune

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
    assert out.dtype == torch.float32  # that of the norm
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


@pytest.mark.parametrize("package", [torch.nn, ff.nn])
@pytest.mark.parametrize("training", [True, False])
def test_layers_and_stacks_mix(package, training):
    """A layer of ours in PyTorch's stack, and PyTorch's layer in ours, in its fast path too."""
    other = ff.nn if package is torch.nn else torch.nn
    torch.manual_seed(0)
    layer = other.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True)
    mixed = package.TransformerEncoder(layer, 2)
    plain = torch.nn.TransformerEncoder(
        torch.nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True), 2
    )
    plain.load_state_dict(mixed.state_dict())
    mixed.train(training)
    plain.train(training)
    source, mask = torch.randn(BATCH, SOURCE, 8), padding(SOURCE)
    with torch.set_grad_enabled(training):
        for call in ({}, {"src_key_padding_mask": mask}, {"mask": square(SOURCE, torch.float32)}):
            out, expected = mixed(source, **call), plain(source, **call)
            torch.testing.assert_close(out[~mask], expected[~mask])


class Halved(ff.nn.TransformerEncoderLayer):
    """What users do to `torch.nn`'s layer: replace a block."""

    def _sa_block(self, *arguments, **options):
        return super()._sa_block(*arguments, **options) / 2

    def _ff_block(self, x):
        return super()._ff_block(x) / 2


@pytest.mark.parametrize("norm_first", [False, True])
def test_replaced_blocks_are_called(norm_first):
    class Theirs(torch.nn.TransformerEncoderLayer):
        _sa_block = lambda self, *a, **k: super()._sa_block(*a, **k) / 2  # noqa: E731
        _ff_block = lambda self, x: super()._ff_block(x) / 2  # noqa: E731

    options = {"norm_first": norm_first, "dtype": torch.float64}
    ours, theirs = (kind(WIDTH, HEADS, HIDDEN, 0.0, **options) for kind in (Halved, Theirs))
    theirs.load_state_dict(ours.state_dict())
    source = tensors(False)[:1]
    torch.testing.assert_close(run(ours, source), run(theirs, source))


def test_hooks_on_parts_are_called():
    for name, inputs in (("TransformerEncoderLayer", 1), ("TransformerDecoderLayer", 2)):
        called = []
        for module in layers(name):
            seen = set()
            for part, child in module.named_children():
                child.register_forward_hook(lambda *_, part=part, seen=seen: seen.add(part))
            module(*[tensors(False)[0]] * inputs)
            called.append(seen)
        assert called[0] == called[1]


def test_pruned_and_replaced_parts():
    theirs, ours = layers("TransformerEncoderLayer")
    for module in (theirs, ours):
        # Pruning renews the weight before each call: what the op reads itself would be stale.
        torch.nn.utils.prune.ln_structured(module.linear1, "weight", 0.5, 2, 0)
        torch.nn.utils.prune.l1_unstructured(module.norm2, "weight", 0.3)
        module.dropout1 = module.dropout = torch.nn.Identity()
        with torch.no_grad():
            module.linear1.weight_orig.mul_(2)
            module.norm2.weight_orig.mul_(2)
    source = tensors(False)[:1]
    torch.testing.assert_close(run(ours, source), run(theirs, source))


@pytest.mark.parametrize(
    "name", ["TransformerEncoderLayer", "TransformerDecoderLayer", "TransformerEncoder"]
)
def test_signatures_are_those_of_torch(name):
    for method in ("__init__", "forward"):
        theirs, ours = (
            inspect.signature(getattr(getattr(package, name), method)).parameters
            for package in (torch.nn, ff.nn)
        )
        expected = [(p.name, p.default) for p in theirs.values()]
        assert [(p.name, p.default) for p in ours.values()] == expected


@pytest.mark.parametrize("norm_first", [False, True])
def test_second_derivatives(norm_first):
    options = {"activation": "gelu", "norm_first": norm_first, "dtype": torch.float64}
    layer = ff.nn.TransformerEncoderLayer(4, 2, 6, 0.0, **options)
    source = torch.randn(2, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(layer, source)


def test_function_transforms_and_forward_mode():
    layer = ff.nn.TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, 0.0, dtype=torch.float64)
    source = tensors(False)[0]
    parameters = dict(layer.named_parameters())

    def loss(parameters, x):
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    got = torch.func.grad(loss)(parameters, source)
    expected = torch.autograd.grad(loss(parameters, source), list(parameters.values()))
    torch.testing.assert_close(list(got.values()), list(expected))
    with ff.explain() as decisions:
        _, tangent = torch.func.jvp(lambda x: loss(parameters, x), (source,), (source,))
    assert {d.backend for d in decisions.decisions} == {"reference"}
    assert "forward-mode" in str(decisions)
    leaf = source.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(parameters, leaf), leaf)
    torch.testing.assert_close(tangent, (gradient * source).sum())
    each = torch.func.vmap(torch.func.grad(loss), (None, 1))(parameters, source[:, :, None])
    summed = [g.sum(0) for g in each.values()]
    torch.testing.assert_close(summed, list(expected))


def test_meta_tensors_give_shapes():
    layer = ff.nn.TransformerDecoderLayer(WIDTH, HEADS, HIDDEN, device="meta")
    x = torch.empty(TARGET, BATCH, WIDTH, device="meta")
    assert layer(x, x).shape == x.shape
