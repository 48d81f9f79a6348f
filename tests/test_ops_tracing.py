"""Graphs and transforms of the ops and modules: export, make_fx, fake tensors, vmap, FLOPs."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from op_calls import CALLS
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, export
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import fuseformer as ff

WIDTH, HEADS, HIDDEN = 8, 2, 16
# Name -> (what makes it of a package and a dropout probability, its inputs, options of the call).
MODULES = {
    "attention": (lambda p, d: p.MultiheadAttention(WIDTH, HEADS, d, batch_first=True), 3, {}),
    "attention without weights": (
        lambda p, d: p.MultiheadAttention(WIDTH, HEADS, d, batch_first=True),
        3,
        {"need_weights": False},
    ),
    **{
        f"{name} {norm_first}": (
            lambda p, d, name=name, norm_first=norm_first: getattr(p, f"Transformer{name}Layer")(
                WIDTH, HEADS, HIDDEN, d, batch_first=True, norm_first=norm_first
            ),
            inputs,
            {},
        )
        for name, inputs in (("Encoder", 1), ("Decoder", 2))
        for norm_first in (False, True)
    },
    "Transformer": (
        lambda p, d: p.Transformer(WIDTH, HEADS, 1, 1, HIDDEN, d, batch_first=True),
        2,
        {},
    ),
}


def first(result):
    return result[0] if isinstance(result, tuple) else result


def built(name, dropout=0.0):
    make, inputs, options = MODULES[name]
    torch.manual_seed(0)
    module = make(ff.nn, dropout)
    return module, inputs, lambda *x: first(module(*x, **options)), options


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MODULES)
def test_exported_sizes_stay_free(name, training):
    module, inputs, call, _ = built(name, 0.1 if training else 0.0)
    module.train(training)

    class Call(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = module

        def forward(self, *x):
            return call(*x)

    sizes = {0: Dim("batch", min=2, max=64), 1: Dim("length", min=2, max=64)}
    x = (torch.randn(3, 5, WIDTH),) * inputs
    program = export(Call(), x, dynamic_shapes=((sizes,) * inputs,), strict=False)
    other = (torch.randn(4, 9, WIDTH),) * inputs
    out = program.module()(*other)
    assert out.shape == other[0].shape
    if not training:
        torch.testing.assert_close(out, call(*other))


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("name", MODULES)
def test_make_fx(name, mode):
    module, inputs, call, _ = built(name)
    module.eval()
    x = (torch.randn(3, 5, WIDTH),) * inputs
    graph = make_fx(call, tracing_mode=mode, _allow_non_fake_inputs=True)(*x)
    other = (torch.randn(4, 9, WIDTH),) * inputs if mode == "symbolic" else x
    torch.testing.assert_close(graph(*other), call(*other))


# Where the reference loops over what offsets hold, or picks the rows that count, a fake has none.
READ = ("varlen_attention", "varlen_attention with a bias", "linear_cross_entropy")


@pytest.mark.parametrize(
    ("op", "backend"),
    [(op, b) for op in CALLS for b in ("cpu", "reference") if b == "cpu" or op not in READ],
)
def test_ops_on_fake_tensors(op, backend):
    """Shapes and strides, of gradients too, are those of real tensors."""
    call, make = CALLS[op]
    shapes = []
    for fake in (False, True):
        inputs = [x.requires_grad_() for x in make()]
        if fake:
            mode = FakeTensorMode(allow_non_fake_inputs=True)
            inputs = [mode.from_tensor(x) for x in inputs]
        out = call(*inputs, backend)
        gradients = torch.autograd.grad(out.sum(), inputs)
        shapes.append([(t.shape, t.stride(), t.dtype) for t in (out, *gradients)])
    assert shapes[1] == shapes[0]


@pytest.mark.parametrize("name", [n for n in MODULES if n != "Transformer"])
def test_modules_on_fake_tensors(name):
    with FakeTensorMode():
        _, inputs, call, _ = built(name, 0.1)
        x = torch.randn(3, 5, WIDTH, requires_grad=True)
        call(*(x,) * inputs).sum().backward()
        assert x.grad.shape == x.shape


@pytest.mark.parametrize("name", MODULES)
def test_gradients_a_sample(name):
    module, inputs, _, options = built(name)
    parameters = dict(module.named_parameters())
    samples = torch.randn(3, 5, WIDTH)

    def loss(parameters, x):
        x = (x[None],) * inputs
        return first(torch.func.functional_call(module, parameters, x, options)).square().sum()

    each = torch.vmap(torch.func.grad(loss), (None, 0))(parameters, samples)
    for index, sample in enumerate(samples):
        expected = torch.autograd.grad(loss(parameters, sample), list(parameters.values()))
        got = [g[index] for g in each.values()]
        torch.testing.assert_close(got, list(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("randomness", ["different", "same"])
def test_dropout_under_vmap(name, randomness):
    _, inputs, call, _ = built(name, 0.5)
    x = torch.randn(1, 2, 5, WIDTH).expand(3, -1, -1, -1)
    out = torch.vmap(lambda x: call(*(x,) * inputs), randomness=randomness)(x)
    assert out.shape == x.shape
    assert torch.equal(out[0], out[1]) == (randomness == "same")


def count(call):
    with FlopCounterMode(display=False) as counter:
        out = first(call())
        forward = counter.get_total_flops()
        if out.requires_grad:
            out.sum().backward()
    return forward, counter.get_total_flops() - forward


def randn(*sizes):
    return torch.randn(*sizes, requires_grad=True)


def test_flops_of_ops():
    q, k = randn(2, 4, 6, 8), randn(2, 4, 10, 8)
    pairs = 2 * 4 * 6 * 10 * 8
    assert count(lambda: ff.attention(q, k, k)) == (4 * pairs, 10 * pairs)
    packed, offsets = randn(9, 4, 8), torch.tensor([0, 2, 9], dtype=torch.int32)
    pairs = 4 * (2 * 2 + 7 * 7) * 8
    call = lambda: ff.varlen_attention(packed, packed, packed, offsets, offsets, 7, 7)  # noqa: E731
    assert count(call) == (4 * pairs, 10 * pairs)
    with torch.no_grad():
        lengths = torch.tensor([10, 3])
        decoded = count(lambda: ff.decode_attention(q[:, :, :1], k, k, lengths))
    assert decoded == (4 * 4 * 13 * 8, 0)
    x, w1, w2 = randn(5, 8), randn(12, 8), randn(8, 12)
    plain = count(lambda: F.linear(F.relu(F.linear(x, w1)), w2))
    assert count(lambda: ff.feed_forward(x, w1, None, w2, None)) == plain
    plain = count(lambda: F.linear(F.silu(F.linear(x, w1)) * F.linear(x, w1), w2))
    assert count(lambda: ff.gated_feed_forward(x, w1, w1, w2)) == plain
    target = torch.arange(5)
    product = 2 * 5 * 12 * 8
    assert count(lambda: ff.linear_cross_entropy(x, w1, target)) == (3 * product, 0)
    each = count(lambda: ff.linear_cross_entropy(x, w1, target, reduction="none"))
    assert each == (product, 3 * product)
    assert count(lambda: ff.add_layer_norm(x, x, None, None)) == (0, 0)


@pytest.mark.parametrize("name", MODULES)
def test_flops_of_modules_are_those_of_torch(name):
    make, inputs, options = MODULES[name]
    x = (torch.randn(3, 5, WIDTH),) * inputs
    ours, plain = (make(p, 0.0) for p in (ff.nn, nn))
    with sdpa_kernel(SDPBackend.MATH):  # the CPU's own kernel is not in PyTorch's table
        got, expected = (count(lambda m=m: m(*x, **options)) for m in (ours, plain))
    assert got[0] == expected[0]
    # The logits that the backward pass computes again.
    assert expected[1] <= got[1] <= 1.25 * expected[1]


def test_the_counter_is_not_imported_with_the_package():
    """It imports triton; whichever comes first, formulas are registered."""
    for code in (
        "import fuseformer, sys; assert 'torch.utils.flop_counter' not in sys.modules; "
        "import torch.utils.flop_counter as c",
        "import torch.utils.flop_counter as c, fuseformer",
    ):
        check = "import torch; assert torch.ops.fuseformer.attention in c.flop_registry"
        subprocess.run([sys.executable, "-c", f"{code}; {check}"], check=True)


class Mixed(nn.Module):
    """A model of a user, who traces it with `torch.fx`."""

    def __init__(self):
        super().__init__()
        self.encoder = built("Encoder False")[0]
        self.stack = ff.nn.TransformerEncoder(self.encoder, 1)
        self.decoder = built("Decoder True")[0]
        self.pair = ff.nn.TransformerDecoder(self.decoder, 1)
        self.attention = built("attention")[0]
        self.norm, self.rms = ff.nn.AddLayerNorm(WIDTH), ff.nn.AddRMSNorm(WIDTH)
        self.feed, self.gated = ff.nn.FeedForward(WIDTH, 4), ff.nn.GatedFeedForward(WIDTH, 4)
        self.loss = ff.nn.LinearCrossEntropy(WIDTH, 9)

    def forward(self, x, target, padding):
        x = self.stack(self.encoder(x, src_key_padding_mask=padding))
        x = self.pair(self.decoder(x, x, tgt_key_padding_mask=padding), x) + 1
        x = self.norm(self.attention(x, x, x)[0], x)
        y, total = self.rms(self.feed(x), self.gated(x))
        return self.loss(y + total, target)


def test_modules_are_nodes_of_a_symbolic_trace():
    model = Mixed()
    graph = torch.fx.symbolic_trace(model)
    called = {node.target for node in graph.graph.nodes if node.op == "call_module"}
    assert called == {name for name, _ in model.named_children()}
    inputs = (
        torch.randn(2, 5, WIDTH),
        torch.arange(5).expand(2, 5),
        torch.tensor([[False] * 5, [False] * 3 + [True] * 2]),
    )
    torch.testing.assert_close(graph(*inputs), model(*inputs))
