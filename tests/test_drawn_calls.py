"""Blocks, norms, loss and rotary under drawn calls: finite in, finite and right out, any layout.

What one backend refuses the others must refuse too, in the same words. The draws are the same in
every run, and a failure prints its call.
"""

import re

import pytest
import torch
from drawn_calls import MAKERS, DrawnCall, drawn_calls
from hypothesis import HealthCheck, Phase, given, settings
from matrix import FULL

from fuseformer.testing import assert_close_to_reference

pytest.importorskip("ttsem")

#: Calls of each op, 300 in all; `make sanitize` takes 34 times as many.
EXAMPLES = {"cpu": 40, "triton": 10}


def results(call: DrawnCall, backend, dtype=None):
    """Return results by name, gradients after a d; `dtype` takes the place of the call's own."""
    leaves = {}
    for name, x in call.floats.items():
        leaf = x.detach() if dtype is None else x.detach().to(dtype)
        leaves[name] = leaf.requires_grad_()
    out = call.run(leaves, backend)
    generator = torch.Generator().manual_seed(5)
    incoming = [torch.randn(y.shape, generator=generator).to(torch.bfloat16) for y in out]
    gradients = torch.autograd.grad(
        out, list(leaves.values()), [g.to(y.dtype) for g, y in zip(incoming, out, strict=True)]
    )
    named = {f"result {i}": y.detach() for i, y in enumerate(out)}
    return named | {f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}


def share(exact, low):
    """Return the error of `low` as a share of the largest exact value."""
    largest = exact.abs().max().item() if exact.numel() else 0.0
    return (low.double() - exact.double()).abs().max().item() / largest if largest else 0.0


def check(call: DrawnCall, backend):
    """Hold a call to the rule; return whether it was served, and not refused by every backend.

    Of a few values, plain PyTorch's own error may be next to nothing by chance: there its largest
    share of error in this call stands for it.
    """
    try:
        actual = results(call, backend)
    except (ValueError, TypeError) as refusal:
        with pytest.raises(type(refusal), match=f"^{re.escape(str(refusal))}$"):
            results(call, "reference")
        return False
    low = results(call, "reference")
    exact = results(call, "reference", torch.float64)
    worst = max(share(exact[name], low[name]) for name in exact)
    for name, result in actual.items():
        wanted, plain = exact[name].double(), low[name].double()
        assert plain.isfinite().all(), f"{call}: {name}: the draw leaves the range of its dtype"
        # Expanded operands repeat their results: only different ones are chances of an error.
        if 0 < wanted.float().unique().numel() < 64:
            plain = wanted + worst * wanted.abs().max()
        factor = 3.0 if name.startswith("d") else 2.0
        assert_close_to_reference(result, wanted, plain, factor=factor, name=f"{call}: {name}")
    return True


def explore(op, backend):
    served = []

    @settings(
        max_examples=EXAMPLES[backend] * (34 if FULL else 1),
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate,),
    )
    @given(drawn_calls(op))
    def judged(call):
        served.append(check(call, backend))

    judged()
    assert sum(served) > len(served) / 3, "most calls were refused"


@pytest.mark.parametrize("op", MAKERS)
def test_drawn_calls_on_the_cpu(op):
    explore(op, "cpu")


@pytest.mark.parametrize("op", MAKERS)
def test_drawn_calls_in_triton(op, triton_on_cpu):
    explore(op, "triton")


@pytest.mark.parametrize("shift", [0.1, float("nan")])
def test_a_wrong_result_is_seen(shift):
    class Wrong(DrawnCall):
        def run(self, floats, backend):
            out = super().run(floats, backend)
            return tuple(y + shift for y in out) if backend == "cpu" else out

    torch.manual_seed(0)
    tensors = {"x": torch.randn(9, 40), "residual": torch.randn(9, 40), "weight": torch.rand(40)}
    assert check(DrawnCall("add_rms_norm", tensors, {"eps": 1e-5}), "cpu")
    with pytest.raises(AssertionError, match="result 0"):
        check(Wrong("add_rms_norm", tensors, {"eps": 1e-5}), "cpu")
