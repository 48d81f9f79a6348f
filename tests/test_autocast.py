"""Result dtypes under autocast: those of torch.nn and its functions, for every op and module."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fuseformer as ff
from fuseformer.ops.registration import autocast_float_dtype

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
HALF = (torch.bfloat16, torch.float16)
WIDTH, HEADS = 8, 2
OFFSETS, LENGTHS = (torch.tensor(n, dtype=torch.int32) for n in ([0, 2, 4], [4, 3]))


def weight(*sizes):
    return nn.Parameter(torch.ones(*sizes) / 4)


def heads(x):
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def twins():
    """Name -> (the op, plain PyTorch) of `x` (2, 4, WIDTH), a residual, and a backend."""
    w, w1, w2, b = weight(WIDTH), weight(12, WIDTH), weight(WIDTH, 12), weight(12)
    target = torch.arange(4).expand(2, 4)
    angles = torch.ones(4, 2), torch.ones(4, 2)

    def attend(x, _):
        return F.scaled_dot_product_attention(*[heads(x)] * 3)

    def plain_loss(x, _):
        return F.cross_entropy(F.linear(x, w1).flatten(0, 1), target.flatten())

    return {
        "attention": (lambda x, _, k: ff.attention(*[heads(x)] * 3, backend=k), attend),
        "attention with its lse": (
            lambda x, _, k: ff.attention(*[heads(x)] * 3, return_lse=True, backend=k),
            lambda x, r: (attend(x, r), torch.zeros(())),
        ),
        "varlen_attention": (
            lambda x, _, k: ff.varlen_attention(
                *[x[0].unflatten(-1, (HEADS, -1))] * 3, OFFSETS, OFFSETS, 2, 2, backend=k
            ),
            attend,
        ),
        "decode_attention": (
            lambda x, _, k: ff.decode_attention(*[heads(x).detach()] * 3, LENGTHS, backend=k),
            attend,
        ),
        "feed_forward": (
            lambda x, _, k: ff.feed_forward(x, w1, b, w2, None, backend=k),
            lambda x, _: F.linear(F.relu(F.linear(x, w1, b)), w2),
        ),
        "gated_feed_forward": (
            lambda x, _, k: ff.gated_feed_forward(x, w1, w1, w2, backend=k),
            lambda x, _: F.linear(F.silu(F.linear(x, w1)) * F.linear(x, w1), w2),
        ),
        "linear_cross_entropy": (
            lambda x, _, k: ff.linear_cross_entropy(x, w1, target, backend=k),
            plain_loss,
        ),
        "rotary": (
            lambda x, r, k: ff.rotary(heads(x), heads(x), *angles, backend=k),
            lambda x, _: (heads(x), heads(x)),
        ),
        **{
            f"add_layer_norm {return_residual} {w is None}": (
                lambda x, r, k, w=w, s=return_residual: ff.add_layer_norm(
                    x, r, w, w, return_residual=s, backend=k
                ),
                lambda x, r, w=w, s=return_residual: (
                    (F.layer_norm(r + x, (WIDTH,), w, w), r + x)
                    if s
                    else F.layer_norm(r + x, (WIDTH,), w, w)
                ),
            )
            for return_residual, w in itertools.product((False, True), (w, None))
        },
        **{
            f"add_rms_norm {w is None}": (
                lambda x, r, k, w=w: ff.add_rms_norm(x, r, w, eps=1e-5, backend=k),
                lambda x, r, w=w: (F.rms_norm(r + x, (WIDTH,), w), r + x),
            )
            for w in (w, None)
        },
    }


def dtypes(result):
    if isinstance(result, tuple):
        return tuple(None if t is None else t.dtype for t in result)
    return result.dtype


def check(ours, plain, *inputs):
    """The dtype of the results, and of each gradient."""
    kinds = []
    for call in (plain, ours):
        leaves = [x.clone().requires_grad_() for x in inputs]
        result = call(*leaves)
        first = result[0] if isinstance(result, tuple) else result
        if first.requires_grad:
            first.sum().backward()
            assert all(x.grad is None or x.grad.dtype == x.dtype for x in leaves)
        kinds.append(dtypes(result))
    assert kinds[1] == kinds[0]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("op", twins())
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_ops(op, backend):
    """Inputs and residuals in every pair of dtypes, under each autocast and none."""
    ours, plain = twins()[op]
    for active, kind, other in itertools.product((*HALF, None), FLOATS, FLOATS):
        if active is None and (kind != torch.float32 and not op.startswith("add_")):
            continue  # without autocast a product wants one dtype
        x, residual = torch.randn(2, 4, WIDTH, dtype=kind), torch.randn(2, 4, WIDTH, dtype=other)
        with torch.autocast("cpu", dtype=active or torch.bfloat16, enabled=active is not None):
            check(lambda x, r: ours(x, r, backend), plain, x, residual)


def square(length):
    return nn.Transformer.generate_square_subsequent_mask(length)


MASKS = {
    "none": {},
    "causal": {"mask": square(4), "causal": True},
    "mask": {"mask": square(4)},
    "padding": {"padding": torch.tensor([[False] * 4, [False, False, True, True]])},
}


@pytest.mark.parametrize("name", ["MultiheadAttention", "Encoder", "Decoder"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.filterwarnings("ignore:Support for mismatched")
def test_layers(name, training, mask, monkeypatch):
    """PyTorch's fast path, which autocast on a GPU turns off, rounds its result on the CPU."""
    asked = MASKS[mask]
    monkeypatch.setattr(torch.backends.mha, "_is_fastpath_enabled", False)
    options = {"dropout": 0.1, "batch_first": True}
    for flag, grad in itertools.product((False, True), repeat=2):
        pair = []
        for package in (nn, ff.nn):
            if name == "MultiheadAttention":
                module = package.MultiheadAttention(WIDTH, HEADS, **options)

                def call(x, r, module=module, flag=flag):
                    return module(
                        x,
                        x,
                        x,
                        key_padding_mask=asked.get("padding"),
                        attn_mask=asked.get("mask"),
                        is_causal=asked.get("causal", False),
                        need_weights=flag,
                    )
            else:
                kind = getattr(package, f"Transformer{name}Layer")
                module = kind(WIDTH, HEADS, 12, norm_first=flag, **options)
                words = ("src", "is_causal") if name == "Encoder" else ("tgt", "tgt_is_causal")
                call_options = {
                    f"{words[0]}_key_padding_mask": asked.get("padding"),
                    f"{words[0]}_mask": asked.get("mask"),
                    words[1]: asked.get("causal", False),
                }

                def call(x, r, module=module, options=call_options):
                    return module(*(x, r)[: 1 + (name == "Decoder")], **options)

            module.train(training)
            pair.append(call)
        for active, kind, other in itertools.product(HALF, FLOATS, FLOATS):
            if name != "Decoder" and kind != other:
                continue
            x, memory = (torch.randn(2, 4, WIDTH, dtype=d) for d in (kind, other))
            with torch.autocast("cpu", dtype=active), torch.set_grad_enabled(grad):
                check(pair[1], pair[0], x, memory)


def test_modules_that_torch_has_not():
    x = torch.randn(2, 4, WIDTH)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ff.nn.FeedForward(WIDTH, 12)(x).dtype == torch.bfloat16
        assert ff.nn.GatedFeedForward(WIDTH, 12)(x).dtype == torch.bfloat16
        assert ff.nn.AddLayerNorm(WIDTH)(x.bfloat16(), x).dtype == torch.float32
        assert dtypes(ff.nn.AddRMSNorm(WIDTH)(x.bfloat16(), x)) == (torch.float32,) * 2
        assert dtypes(ff.nn.AddRMSNorm(WIDTH)(*[x.bfloat16()] * 2)) == (torch.bfloat16,) * 2
        assert ff.nn.Transformer(WIDTH, HEADS, 1, 1, 12)(x, x).dtype == torch.float32


def test_on_a_gpu_norms_and_softmax_give_float32():
    """As PyTorch's lists for CUDA say; fake tensors, and autocast as if a GPU were there."""
    enabled = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", True)
    try:
        with FakeTensorMode():
            for kind in (*FLOATS, torch.float64):
                x = torch.empty(2, 3, device="cuda", dtype=kind)
                assert autocast_float_dtype(x, kind) == F.layer_norm(x, (3,)).dtype
                assert autocast_float_dtype(x, kind) == F.softmax(x, -1).dtype
    finally:
        torch.set_autocast_enabled("cuda", enabled)
