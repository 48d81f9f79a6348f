"""Parts of a module that were replaced, hooked or wrapped: what torch.nn would run, runs."""

import types
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as module_hooks
from torch.nn.utils import parametrizations, parametrize

import fuseformer as ff

WIDTH, HEADS, HIDDEN = 8, 2, 12
LAYERS = {"TransformerEncoderLayer": 1, "TransformerDecoderLayer": 2}


def doubled(module, log, name):
    """Replace `forward` as offloading does: on the module, around what it was."""
    original = module.forward

    def forward(*arguments, **options):
        log.append(name)
        out = original(*arguments, **options)
        return (2 * out[0], *out[1:]) if isinstance(out, tuple) else 2 * out

    module.forward = forward


def subclassed(module, log, name):
    kind = type(module)

    def forward(self, *arguments, **options):
        log.append(name)
        out = kind.forward(self, *arguments, **options)
        return (out[0] + 1, *out[1:]) if isinstance(out, tuple) else out + 1

    module.__class__ = type("Changed", (kind,), {"forward": forward})


def hook(module, log, name):
    def call(module, inputs, out):
        log.append(name)
        return (out[0] * 3, *out[1:]) if isinstance(out, tuple) else out * 3

    module.register_forward_hook(call)


def hook_with_kwargs(module, log, name):
    # The names of the keywords are the package's own business.
    module.register_forward_hook(lambda *_: log.append(name), with_kwargs=True)


def hook_always(module, log, name):
    module.register_forward_hook(lambda *_: log.append(name), always_call=True)


def pre_hook(module, log, name):
    def call(module, inputs):
        log.append(name)
        return tuple(x * 2 for x in inputs)

    module.register_forward_pre_hook(call)


def full_backward_hook(module, log, name):
    def call(module, inputs, outputs):
        log.append(name)
        return tuple(None if g is None else g * 2 for g in inputs)

    module.register_full_backward_hook(call)


def full_backward_pre_hook(module, log, name):
    def call(module, outputs):
        log.append(name)
        return tuple(None if g is None else g * 2 for g in outputs)

    module.register_full_backward_pre_hook(call)


def weights(module):
    return {
        n for n, p in module.named_parameters(recurse=False) if n.endswith("weight") and p.ndim > 1
    }


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


def parametrized(module, log, name):
    for parameter in [n for n, _ in module.named_parameters(recurse=False)]:
        parametrize.register_parametrization(module, parameter, Halved())


def weight_norm(module, log, name):
    for parameter in weights(module):
        parametrizations.weight_norm(module, parameter)
        with torch.no_grad():
            getattr(module.parametrizations, parameter).original0.mul_(2)


def hooked_weight_norm(module, log, name):
    for parameter in weights(module):
        nn.utils.weight_norm(module, parameter)
        getattr(module, f"{parameter}_g").data.mul_(2)  # the hook computes the weight anew


def spectral_norm(module, log, name):
    for parameter in weights(module):
        parametrizations.spectral_norm(module, parameter)
    # In training every look at the weight improves it, and PyTorch looks more than once.
    module.eval()


CHANGES = [
    doubled,
    subclassed,
    hook,
    hook_with_kwargs,
    hook_always,
    pre_hook,
    full_backward_hook,
    full_backward_pre_hook,
    parametrized,
    weight_norm,
    hooked_weight_norm,
    spectral_norm,
]


def layer_pair(name, **options):
    built = []
    for package in (nn, ff.nn):
        torch.manual_seed(0)
        layer = getattr(package, name)(
            WIDTH, HEADS, HIDDEN, 0.0, activation=nn.GELU(), dtype=torch.float64, **options
        )
        built.append(layer)
    return built


def source():
    torch.manual_seed(1)
    return torch.randn(4, 2, WIDTH, dtype=torch.float64)


def run(module, inputs):
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    out = module(*inputs)
    out = out[0] if isinstance(out, tuple) else out
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)).sum().backward()
    gradients = {name: p.grad for name, p in module.named_parameters()}
    return out.detach(), [x.grad for x in inputs], gradients


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_every_part_of_a_layer(name, change):
    """Each part on its own, those of the attention too: values, gradients and calls."""
    parts = [n for n, _ in layer_pair(name)[0].named_modules() if n]
    for norm_first in (False, True):
        for part in parts:
            results, logs = [], []
            for layer in layer_pair(name, norm_first=norm_first):
                torch.manual_seed(2)  # for the vectors of spectral_norm
                log = []
                change(layer.get_submodule(part), log, part)
                results.append(run(layer, [source()] * LAYERS[name]))
                logs.append(log)
            assert logs[1] == logs[0], part
            torch.testing.assert_close(results[1], results[0], msg=lambda m, p=part: f"{p}: {m}")


class Square(nn.Bilinear):
    def forward(self, x):
        return super().forward(x, x)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(
    ("part", "other"),
    [
        ("activation", torch.tanh),
        ("activation", nn.Softplus()),
        ("activation", lambda x: F.relu(x) * 2),
        ("dropout", nn.Identity()),
        ("dropout1", nn.Softsign()),
        ("norm1", nn.RMSNorm(WIDTH, dtype=torch.float64)),
        ("norm2", nn.LayerNorm(WIDTH, elementwise_affine=False)),
        ("norm1", nn.Identity()),
        ("linear1", nn.Sequential(nn.Linear(WIDTH, HIDDEN, dtype=torch.float64), nn.Tanh())),
        ("linear2", Square),
    ],
)
def test_replaced_parts(name, part, other):
    results = []
    for layer in layer_pair(name):
        replacement = other
        if other is Square:
            torch.manual_seed(0)
            replacement = Square(HIDDEN, HIDDEN, WIDTH, dtype=torch.float64)
        delattr(layer, part)  # a function may come where a module was
        setattr(layer, part, replacement)
        if isinstance(replacement, nn.Module):
            replacement.zero_grad()
        results.append(run(layer, [source()] * LAYERS[name]))
        # The two share the replacement and its gradients.
        results[-1] = (*results[-1][:2], {k: g.clone() for k, g in results[-1][2].items()})
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(
    "register",
    [
        module_hooks.register_module_forward_hook,
        module_hooks.register_module_forward_pre_hook,
        module_hooks.register_module_full_backward_hook,
        module_hooks.register_module_full_backward_pre_hook,
    ],
)
def test_global_hooks(name, register):
    seen = []
    for layer in layer_pair(name):
        names = {module: part for part, module in layer.named_modules()}
        log = []
        handle = register(lambda module, *_, log=log, names=names: log.append(names[module]))
        try:
            run(layer, [source()] * LAYERS[name])
        finally:
            handle.remove()
        seen.append(log)
    assert seen[0] == seen[1]
    assert "linear1" in seen[1]


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("kind", [nn.Linear, nn.LayerNorm, nn.Dropout, nn.GELU])
def test_classes_changed_for_a_while(name, kind):
    """As profilers do it."""
    counts = []
    for layer in layer_pair(name):
        with mock.patch.object(kind, "forward", autospec=True, side_effect=kind.forward) as called:
            run(layer, [source()] * LAYERS[name])
        counts.append(called.call_count)
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_blocks_replaced_on_the_layer(name, norm_first):
    for block in ("_sa_block", "_ff_block", "_mha_block"):
        results = []
        for layer in layer_pair(name, norm_first=norm_first):
            if not hasattr(layer, block):
                continue
            old = getattr(layer, block)
            new = types.MethodType(lambda self, x, *_, old=old, **__: x.tanh(), layer)
            setattr(layer, block, new)
            results.append(run(layer, [source()] * LAYERS[name])[0])
        torch.testing.assert_close(results[1:], results[:1] if results else [])


class Wrapped(torch.Tensor):
    """A weight that decides itself what a product with it is, as quantised ones do."""

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), options=None):
        arguments = [a.as_subclass(torch.Tensor) if isinstance(a, cls) else a for a in arguments]
        if function is F.linear:
            return 2 * F.linear(*arguments, **(options or {}))
        return super().__torch_function__(function, types, arguments, options or {})


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("part", ["linear1", "linear2"])
def test_weights_that_know_better(name, part):
    results = []
    for layer in layer_pair(name):
        linear = getattr(layer, part)
        linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Wrapped), False)
        results.append(layer(*[source()] * LAYERS[name]))
    torch.testing.assert_close(results[1], results[0])


class Plain(nn.Module):
    """The parts of this package's feed-forward blocks, each called."""

    def __init__(self, block):
        super().__init__()
        for part, module in block.named_children():
            setattr(self, part, module)
        self.gated = isinstance(block, ff.nn.GatedFeedForward)

    def forward(self, x):
        if self.gated:
            return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return self.linear2(F.gelu(self.linear1(x)))


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
def test_parts_of_feed_forward_blocks(change, gated):
    kind, options = (ff.nn.GatedFeedForward, {}) if gated else (ff.nn.FeedForward, {})
    activation = "silu" if gated else "gelu"
    for part in dict(kind(WIDTH, HIDDEN).named_children()):
        results, logs = [], []
        for build in (Plain, lambda block: block):
            torch.manual_seed(0)
            block = build(kind(WIDTH, HIDDEN, activation, dtype=torch.float64, **options))
            torch.manual_seed(2)
            log = []
            change(block.get_submodule(part), log, part)
            results.append(run(block, [source()]))
            logs.append(log)
        assert logs[0] == logs[1], part
        torch.testing.assert_close(results[1], results[0])


def test_plain_parts_are_fused():
    """The checks refuse nothing that is plain."""
    for name, inputs in LAYERS.items():
        with ff.explain() as decisions:
            layer_pair(name)[1](*[source()] * inputs)
        ops = {d.request.op for d in decisions.decisions}
        assert ops == {"attention", "feed_forward", "add_layer_norm"}
