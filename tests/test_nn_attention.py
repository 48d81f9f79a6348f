"""MultiheadAttention against that of torch.nn, with every mask and option."""

import copy
import itertools
import pickle

import fuseformer as ff
import pytest
import torch
from fuseformer.testing import assert_close_to_reference


def pair(**options):
    """Return torch's module and ours with the same weights, in float64."""
    torch.manual_seed(0)
    theirs = torch.nn.MultiheadAttention(24, 4, dtype=torch.float64, **options)
    torch.manual_seed(0)
    ours = ff.nn.MultiheadAttention(24, 4, dtype=torch.float64, **options)
    for a, b in zip(theirs.parameters(), ours.parameters(), strict=True):
        assert torch.equal(a, b)
    with torch.no_grad():  # biases start at 0, which would hide their mistakes
        for parameter in theirs.parameters():
            parameter.normal_(0, 0.3)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def check(theirs, ours, inputs, **arguments):
    """Compare outputs, weights and every gradient."""
    results = []
    for module in (ours, theirs):
        leaves = [t.clone().requires_grad_() for t in inputs]
        torch.manual_seed(1)
        out, weights = module(*leaves, **arguments)
        loss = (out * torch.randn(out.shape, dtype=out.dtype)).sum()
        if weights is not None:
            loss = loss + (weights * torch.randn(weights.shape, dtype=out.dtype)).sum()
        grads = torch.autograd.grad(loss, [*leaves, *module.parameters()], allow_unused=True)
        results.append([out, weights, *grads])
    for a, e in zip(*results, strict=True):
        assert (a is None) == (e is None)
        if a is not None:
            torch.testing.assert_close(a, e)


MASKS = {
    "none": lambda sq, sk: None,
    "bool": lambda sq, sk: torch.rand(sq, sk) < 0.3,
    "float": lambda sq, sk: torch.randn(sq, sk, dtype=torch.float64),
    "per_head": lambda sq, sk: torch.randn(2 * 4, sq, sk, dtype=torch.float64),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("padding", ["none", "bool", "float"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"batch_first": True, "bias": False},
        {"add_bias_kv": True},
        {"add_zero_attn": True, "add_bias_kv": True, "batch_first": True},
        {"kdim": 10, "vdim": 14},
    ],
    ids=str,
)
def test_equals_torch(mask, padding, options):
    theirs, ours = pair(**options)
    sq, sk, batch = 7, 9, 2
    attn_mask = MASKS[mask](sq, sk)
    if mask == "bool":
        attn_mask[:, 0] = False
    pad = None
    if padding != "none":
        pad = torch.tensor([[False] * 6 + [True] * 3, [False] * 9])
        if padding == "float":
            pad = torch.zeros(2, 9, dtype=torch.float64).masked_fill(pad, -torch.inf)
    shapes = [(sq, 24), (sk, options.get("kdim", 24)), (sk, options.get("vdim", 24))]
    first = options.get("batch_first", False)
    inputs = [
        torch.randn(*((batch, s, w) if first else (s, batch, w)), dtype=torch.float64)
        for s, w in shapes
    ]
    for need, average in ((False, True), (True, True), (True, False)):
        check(
            theirs,
            ours,
            inputs,
            attn_mask=attn_mask,
            key_padding_mask=pad,
            need_weights=need,
            average_attn_weights=average,
        )


@pytest.mark.parametrize(("need", "causal"), itertools.product([False, True], [False, True]))
def test_unbatched_and_self_attention(need, causal):
    theirs, ours = pair(batch_first=True)
    x = torch.randn(6, 24, dtype=torch.float64)
    mask = torch.ones(6, 6, dtype=torch.bool).triu(1) if causal else None
    pad = torch.tensor([False] * 4 + [True] * 2)
    for module in (theirs, ours):
        module.eval()
    ours_out = ours(x, x, x, pad, need, mask, is_causal=causal)
    theirs_out = theirs(x, x, x, pad, need, mask, is_causal=causal)
    for a, e in zip(ours_out, theirs_out, strict=True):
        if e is not None:
            torch.testing.assert_close(a, e)


def test_causal_hint_takes_the_causal_path():
    _, ours = pair(batch_first=True)
    x = torch.randn(2, 6, 24, dtype=torch.float64)
    mask = torch.ones(6, 6, dtype=torch.bool).triu(1)
    with ff.explain() as decisions:
        hinted, _ = ours(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)
        masked, _ = ours(x, x, x, attn_mask=mask, need_weights=False)
    torch.testing.assert_close(hinted, masked)
    assert [sorted(d.request.options) for d in decisions.decisions] == [[], ["bias"]]


def test_a_sequence_of_padding_gives_the_output_bias_and_no_gradient():
    _, ours = pair(batch_first=True)
    x = torch.randn(2, 5, 24, dtype=torch.float64, requires_grad=True)
    pad = torch.tensor([[True] * 5, [False] * 5])
    out, weights = ours(x, x, x, key_padding_mask=pad)
    torch.testing.assert_close(out[0], ours.out_proj.bias.expand(5, 24))
    assert (weights[0] == 0).all()
    out.sum().backward()
    assert (x.grad[0] == 0).all()
    assert x.grad[1].isfinite().all()


def test_weights_load_both_ways_and_copies_keep_the_class():
    theirs, ours = pair(add_bias_kv=True)
    theirs.load_state_dict(ours.state_dict())
    clone = pickle.loads(pickle.dumps(copy.deepcopy(ours)))
    assert type(clone) is ff.nn.MultiheadAttention
    assert clone.state_dict().keys() == theirs.state_dict().keys()
    assert isinstance(ours, torch.nn.MultiheadAttention)


def test_dropout_runs_in_training_alone():
    ours = ff.nn.MultiheadAttention(24, 4, dropout=0.5, batch_first=True)
    x = torch.randn(2, 6, 24)
    torch.manual_seed(0)
    first = ours(x, x, x)[0]
    second = ours(x, x, x)[0]
    torch.manual_seed(0)
    assert torch.equal(first, ours(x, x, x)[0])
    assert not torch.equal(first, second)
    ours.eval()
    assert torch.equal(ours(x, x, x)[0], ours(x, x, x)[0])


def test_autocast():
    ours = ff.nn.MultiheadAttention(24, 4, batch_first=True)
    x = torch.randn(2, 6, 24)
    with torch.autocast("cpu", torch.bfloat16):
        out, weights = ours(x, x, x)
    assert out.dtype == weights.dtype == torch.bfloat16
    exact, low = ours(x, x, x)[0], copy.deepcopy(ours).bfloat16()(*[x.bfloat16()] * 3)[0]
    assert_close_to_reference(out, exact, low)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(2, 5, 23)}, "query: got width 23"),
        ({"key": torch.zeros(5, 24)}, "key: got 2 dimensions"),
        ({"value": torch.zeros(2, 4, 24)}, "value: got shape"),
        ({"key": torch.zeros(3, 5, 24), "value": torch.zeros(3, 5, 24)}, "key: got batch size 3"),
        ({"attn_mask": torch.zeros(5, 4)}, r"attn_mask: got shape \(5, 4\)"),
        ({"key_padding_mask": torch.zeros(5, 2, dtype=torch.bool)}, "key_padding_mask: got shape"),
        ({"is_causal": True}, "attn_mask: got None"),
    ],
)
def test_bad_input_names_the_argument(change, message):
    ours = ff.nn.MultiheadAttention(24, 4, batch_first=True)
    good = {name: torch.zeros(2, 5, 24) for name in ("query", "key", "value")}
    with pytest.raises(ValueError, match=message):
        ours(**(good | change))
