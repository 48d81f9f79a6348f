"""Multi-head attention against `torch.nn.MultiheadAttention`: values, gradients, masks, errors."""

import copy
import io
import itertools

import pytest
import torch

import fuseformer as ff
from fuseformer.nn.attention import is_standard_causal

WIDTH, HEADS, BATCH, QUERIES, KEYS = 12, 3, 2, 5, 7
CONSTRUCTIONS = {
    "plain": {},
    "no bias": {"bias": False},
    "other widths": {"kdim": 6, "vdim": 10},
    "bias_kv": {"add_bias_kv": True},
    "zero key": {"add_zero_attn": True},
    "both keys": {"add_bias_kv": True, "add_zero_attn": True},
}


def pair(**options):
    torch.manual_seed(0)
    theirs = torch.nn.MultiheadAttention(WIDTH, HEADS, dtype=torch.float64, **options)
    torch.manual_seed(0)
    ours = ff.nn.MultiheadAttention(WIDTH, HEADS, dtype=torch.float64, **options)
    return theirs, ours


def run(module, inputs, **call):
    """Return the outputs and the gradients of everything that can have one."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    out, weights = module(*inputs, **call)
    loss = (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)).sum()
    if weights is not None:
        loss = loss + (weights * torch.linspace(0, 1, weights.shape[-1]).to(weights)).sum()
    module.zero_grad()
    loss.backward()
    return [out, weights, *(x.grad for x in inputs), *(p.grad for p in module.parameters())]


def make_inputs(module, batch_first=False, batched=True):
    generator = torch.Generator().manual_seed(1)
    sizes = ((QUERIES, WIDTH), (KEYS, module.kdim), (KEYS, module.vdim))
    x = [torch.randn(BATCH, *s, generator=generator, dtype=torch.float64) for s in sizes]
    if not batched:
        return [t[0] for t in x]
    return x if batch_first else [t.transpose(0, 1) for t in x]


def make_masks(padding, mask):
    call = {}
    if padding != "none":
        hidden = torch.zeros(BATCH, KEYS, dtype=torch.bool)
        hidden[1, 4:] = True
        added = torch.zeros(BATCH, KEYS, dtype=torch.float64).masked_fill(hidden, -1.5)
        call["key_padding_mask"] = hidden if padding == "bool" else added
    if mask != "none":
        generator = torch.Generator().manual_seed(2)
        lead = (BATCH * HEADS,) if mask.startswith("heads") else ()
        added = torch.randn(*lead, QUERIES, KEYS, generator=generator, dtype=torch.float64)
        hidden = added > 0.5
        hidden[..., 0] = False
        call["attn_mask"] = hidden if mask.endswith("bool") else added
    return call


@pytest.mark.parametrize("construction", CONSTRUCTIONS)
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.filterwarnings("ignore:Support for mismatched")
def test_equals_torch_with_every_mask(construction, batch_first):
    theirs, ours = pair(batch_first=batch_first, **CONSTRUCTIONS[construction])
    inputs = make_inputs(ours, batch_first)
    masks = ("none", "bool", "float", "heads bool", "heads float")
    for padding, mask in itertools.product(("none", "bool", "float"), masks):
        for weights in ({"need_weights": False}, {}, {"average_attn_weights": False}):
            call = {**make_masks(padding, mask), **weights}
            torch.testing.assert_close(run(ours, inputs, **call), run(theirs, inputs, **call))


@pytest.mark.parametrize("construction", ["plain", "both keys"])
def test_unbatched(construction):
    theirs, ours = pair(**CONSTRUCTIONS[construction])
    inputs = make_inputs(ours, batched=False)
    for average in (True, False):
        call = {
            "key_padding_mask": make_masks("bool", "none")["key_padding_mask"][1],
            "attn_mask": make_masks("none", "heads bool")["attn_mask"][:HEADS],
            "average_attn_weights": average,
        }
        torch.testing.assert_close(run(ours, inputs, **call), run(theirs, inputs, **call))


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("construction", ["plain", "both keys"])
def test_self_attention_with_the_causal_hint(construction, batch_first):
    theirs, ours = pair(batch_first=batch_first, **CONSTRUCTIONS[construction])
    x = make_inputs(ours, batch_first)[0]
    mask = torch.ones(QUERIES, QUERIES, dtype=torch.bool).triu(1)
    for weights in (True, False):
        expected = theirs(x, x, x, attn_mask=mask, need_weights=weights)
        for given in (mask, None):
            actual = ours(x, x, x, attn_mask=given, is_causal=True, need_weights=weights)
            torch.testing.assert_close(actual, expected)


def test_the_hint_reaches_the_kernel_and_no_weights_are_made():
    _, ours = pair(batch_first=True)
    x = make_inputs(ours, True)[0]
    mask = torch.ones(QUERIES, QUERIES, dtype=torch.bool).triu(1)
    with ff.explain() as hinted:
        assert ours(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[1] is None
    assert [d.request.options for d in hinted.decisions] == [frozenset()]
    with ff.explain() as unhinted:
        ours(x, x, x, attn_mask=mask, need_weights=False)
    assert unhinted.decisions[0].request.options == {"bias"}


def test_shared_key_and_value():
    theirs, ours = pair()
    query, key, _ = make_inputs(ours)
    torch.testing.assert_close(ours(query, key, key), theirs(query, key, key))


def test_fully_masked_sequence_is_zero_and_finite():
    _, ours = pair(batch_first=True)
    hidden = torch.tensor([[False] * KEYS, [True] * KEYS])
    blocked = torch.zeros(BATCH, KEYS, dtype=torch.float64).masked_fill(hidden, -torch.inf)
    for mask in (hidden, blocked):
        out, weights, *gradients = run(ours, make_inputs(ours, True), key_padding_mask=mask)
        torch.testing.assert_close(out[1], ours.out_proj.bias.expand_as(out[1]))
        assert not weights[1].any()
        assert all(g.isfinite().all() for g in gradients)
        assert not gradients[1][1].any()


def test_weights_load_both_ways_and_seeds_agree():
    for options in CONSTRUCTIONS.values():
        theirs, ours = pair(**options)
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)
        ours.load_state_dict(theirs.state_dict(), strict=True)
        theirs.load_state_dict(ours.state_dict(), strict=True)
        assert isinstance(ours, torch.nn.MultiheadAttention)


def test_deepcopy_and_saving():
    _, ours = pair()
    inputs = make_inputs(ours)
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    for other in (copy.deepcopy(ours), torch.load(file, weights_only=False)):
        assert type(other) is ff.nn.MultiheadAttention
        torch.testing.assert_close(other(*inputs), ours(*inputs), rtol=0, atol=0)


def test_dropout_only_in_training_and_repeatable():
    _, ours = pair(dropout=0.5)
    inputs = make_inputs(ours)
    torch.manual_seed(3)
    first = ours(*inputs, need_weights=False)[0]
    torch.manual_seed(3)
    torch.testing.assert_close(ours(*inputs, need_weights=False)[0], first, rtol=0, atol=0)
    ours.eval()
    plain = ours(*inputs, need_weights=False)[0]
    assert not torch.equal(plain, first)
    torch.testing.assert_close(ours(*inputs, need_weights=False)[0], plain, rtol=0, atol=0)


def test_standard_causal_masks_are_recognised():
    added = torch.nn.Transformer.generate_square_subsequent_mask(4)
    assert is_standard_causal(added)
    assert is_standard_causal(added == -torch.inf)
    assert not is_standard_causal(added.clone().requires_grad_())
    assert not is_standard_causal(added[:3])
    assert not is_standard_causal(torch.zeros(4, 4))


@pytest.mark.parametrize(
    ("argument", "call"),
    [
        ("query", {"query": torch.zeros(QUERIES, BATCH, WIDTH + 1, dtype=torch.float64)}),
        ("query", {"query": torch.zeros(1, 1, 1, WIDTH, dtype=torch.float64)}),
        ("key", {"key": torch.zeros(KEYS, BATCH + 1, WIDTH, dtype=torch.float64)}),
        ("value", {"value": torch.zeros(KEYS + 1, BATCH, WIDTH, dtype=torch.float64)}),
        ("value", {"value": None}),
        ("key_padding_mask", {"key_padding_mask": torch.zeros(BATCH, 1, dtype=torch.bool)}),
        ("key_padding_mask", {"key_padding_mask": torch.zeros(BATCH, KEYS, dtype=torch.int64)}),
        ("attn_mask", {"attn_mask": torch.zeros(KEYS, QUERIES)}),
        ("attn_mask", {"attn_mask": [[0.0]]}),
    ],
)
def test_errors_name_the_argument(argument, call):
    _, ours = pair()
    query, key, value = make_inputs(ours)
    if "key" in call:
        call = {**call, "value": call["key"]}
    with pytest.raises((ValueError, TypeError), match=f"^{argument}: got"):
        ours(**{"query": query, "key": key, "value": value, **call})


def test_weights_in_training_are_those_after_dropout():
    """As in PyTorch: the output is what the returned weights make of the values."""
    ours = ff.nn.MultiheadAttention(WIDTH, HEADS, dropout=0.5, dtype=torch.float64)
    query, key, value = make_inputs(ours)
    out, weights = ours(query, key, value, average_attn_weights=False)
    assert (weights == 0).any()
    v = torch.nn.functional.linear(value, ours.in_proj_weight[2 * WIDTH :])  # biases start at 0
    v = v.view(KEYS, BATCH, HEADS, WIDTH // HEADS).permute(1, 2, 0, 3)
    expected = ours.out_proj((weights @ v).permute(2, 0, 1, 3).flatten(2))
    torch.testing.assert_close(out, expected)
    torch.manual_seed(5)
    out = ours(query, key, value)[0]
    torch.manual_seed(5)  # the same elements are dropped whether weights are asked for or not
    torch.testing.assert_close(ours(query, key, value, need_weights=False)[0], out)


def test_masks_that_together_hide_a_row():
    """The padding hides some keys, the additive mask the others."""
    _, ours = pair(batch_first=True)
    hidden = torch.zeros(BATCH, KEYS, dtype=torch.bool)
    hidden[0, :3] = True
    added = torch.zeros(QUERIES, KEYS, dtype=torch.float64)
    added[1, 3:] = -torch.inf
    for need in (True, False):
        call = {"key_padding_mask": hidden, "attn_mask": added, "need_weights": need}
        out, weights, *gradients = run(ours, make_inputs(ours, True), **call)
        torch.testing.assert_close(out[0, 1], ours.out_proj.bias)
        assert weights is None or not weights[0, 1].any()
        assert all(g.isfinite().all() for g in gradients)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_as_in_torch():
    theirs, ours = (
        m(8, 2, batch_first=True).eval() for m in (torch.nn.MultiheadAttention, type(pair()[1]))
    )
    ours.load_state_dict(theirs.state_dict())
    x = torch.nested.nested_tensor([torch.randn(3, 8), torch.randn(5, 8)])
    with torch.no_grad():
        expected = theirs(x, x, x, need_weights=False)[0].to_padded_tensor(0)
        torch.testing.assert_close(
            ours(x, x, x, need_weights=False)[0].to_padded_tensor(0), expected
        )
    with pytest.raises(ValueError, match=r"^query: got a nested tensor"):
        ours(x, torch.randn(2, 5, 8), torch.randn(2, 5, 8))


def test_second_derivatives():
    ours = ff.nn.MultiheadAttention(4, 2, dtype=torch.float64)
    x = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: ours(x, x, x, need_weights=False)[0], x)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_an_empty_nested_tensor():
    layer = ff.nn.TransformerEncoderLayer(8, 2, 12, batch_first=True).eval()
    encoder = ff.nn.TransformerEncoder(layer, 2)
    with torch.no_grad():
        for parts in ([], [torch.empty(0, 8)], [torch.empty(0, 8), torch.randn(3, 8)]):
            x = torch.nested.nested_tensor(parts)
            for out in (encoder(x), layer.self_attn(x, x, x, need_weights=False)[0]):
                assert out.is_nested
                assert [part.shape for part in out.unbind()] == [part.shape for part in parts]


@pytest.mark.parametrize("shape", [(1, 1), (KEYS, QUERIES), (3, 2, 2)])
def test_a_mask_that_the_hint_makes_unused(shape):
    """Of another shape, too: PyTorch then does not look at it."""
    theirs, ours = pair()
    x = make_inputs(ours)[0]
    call = {"attn_mask": torch.zeros(shape, dtype=torch.bool), "is_causal": True}
    got = ours(x, x, x, need_weights=False, **call)
    torch.testing.assert_close(got, theirs(x, x, x, need_weights=False, **call))
    with pytest.raises(ValueError, match=r"^attn_mask: got"):
        ours(x, x, x, **call)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_bias_in_another_dtype(backend, dtype):
    q, k = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 5, 8)
    bias = torch.randn(1, 2, 3, 5).to(dtype).requires_grad_()
    wide = bias.detach().float().requires_grad_()
    results = [ff.attention(q, k, k, bias=b, backend=backend) for b in (bias, wide)]
    torch.testing.assert_close(*results)
    got, expected = (
        torch.autograd.grad(r.sum(), b)[0] for r, b in zip(results, (bias, wide), strict=True)
    )
    assert got.dtype == dtype
    # The gradient was formed from float32 probabilities, whatever holds it.
    torch.testing.assert_close(got.float(), expected.to(dtype).float())
    mask = (q @ k.mT)[0].to(dtype)
    if dtype == torch.float16:  # a half-precision mask beside a float32 input
        ours = ff.nn.MultiheadAttention(16, 2)
        theirs = torch.nn.MultiheadAttention(16, 2)
        theirs.load_state_dict(ours.state_dict())
        x, y = torch.randn(3, 1, 16), torch.randn(5, 1, 16)
        torch.testing.assert_close(
            ours(x, y, y, attn_mask=mask)[0], theirs(x, y, y, attn_mask=mask.float())[0]
        )
