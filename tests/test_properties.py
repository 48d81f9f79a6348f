"""Any finite call of any op on any backend: right results and gradients, or an error that says why.

Right is what the float64 reference says, within the error rule. Refused is what every backend
refuses with the same words, unless it was asked for by name and cannot serve.
"""

import re

import pytest
import torch
from emulated import Kernels
from emulator_build import build
from hypothesis import HealthCheck, Phase, given, settings
from matrix import FULL
from op_strategies import MAKERS, Call, Tensors, calls
from torch import Tensor

import fuseformer as ff
from fuseformer.testing import assert_close_to_reference

#: Examples of each op in `make test`, 300 in all; `make sanitize` takes 34 times as many.
EXAMPLES = {"reference": 7, "cpu": 12, "triton": 11, "cuda": 4}
WITHOUT_KERNELS = {"triton": {"attention_weights"}}
WITH_CUDA = {"attention", "varlen_attention", "decode_attention"}
_WIDE = torch.float64


def _results(call: Call, backend: str, dtype: torch.dtype | None) -> list[Tensor]:
    """Return results and gradients; a `dtype` takes the place of that of the call's floats."""
    floats: Tensors = {name: x.detach() for name, x in call.floats.items()}
    if dtype is not None:
        floats = {name: x.to(dtype) for name, x in floats.items()}
    if not call.trains:
        with torch.no_grad():
            return list(call.run(floats | call.others, backend))
    leaves = {name: x.requires_grad_() for name, x in floats.items()}
    out = call.run(leaves | call.others, backend)
    generator = torch.Generator().manual_seed(5)
    loss = torch.zeros((), dtype=_WIDE)
    for y in out:
        weight = torch.randn(y.shape, generator=generator, dtype=_WIDE)
        # Rounded alike for all, so that no gradient differs before it comes in.
        weight = weight.to(torch.bfloat16).to(_WIDE)
        loss = loss + (torch.where(y.isfinite(), y, 0.0).to(_WIDE) * weight).sum()
    # A gradient of None is one of 0: where there is nothing to compute, nothing need be recorded.
    gradients = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    return [*(y.detach() for y in out), *gradients]


def check(call: Call, backend: str) -> bool:
    """Hold a call against the reference; return whether it was served."""
    try:
        actual = _results(call, backend, None)
    except (ValueError, TypeError) as refusal:
        if not str(refusal).startswith("backend: "):
            with pytest.raises(type(refusal), match=f"^{re.escape(str(refusal))}$"):
                _results(call, "reference", None)
        return False
    exact = _results(call, "reference", _WIDE)
    low = _results(call, "reference", None)
    names = [f"result {i}" for i in range(len(actual) - len(call.floats) * call.trains)]
    names += [f"d{name}" for name in call.floats] * call.trains
    share = max(map(_share_of_error, exact, low))
    for name, a, e, b in zip(names, actual, exact, low, strict=True):
        factor = 2.0 if name.startswith("result") else 3.0
        a, e, b = _representable(a, e, b)
        finite = e[e.isfinite()]
        if 0 < finite.numel() < 64:
            # Of a few values plain PyTorch's own error may be next to nothing by chance; there the
            # largest share of error that it makes in this call stands for it, where that is more.
            own = (b.double() - e)[e.isfinite()].abs().nan_to_num(0.0).max()
            b = e + torch.maximum(own, share * finite.abs().max())
        assert_close_to_reference(a, e, b, factor=factor, name=f"{call}: {name}")
    return True


def _share_of_error(exact: Tensor, low: Tensor) -> float:
    """Return plain PyTorch's largest error, as a share of the largest value."""
    exact, low = exact.double(), low.double()
    finite = exact.isfinite() & low.isfinite()
    if not finite.any():
        return 0.0
    largest = exact[finite].abs().max()
    return float((exact - low)[finite].abs().max() / largest) if largest else 0.0


def _representable(*tensors: Tensor) -> list[Tensor]:
    """Return the places whose exact value, the second tensor, the result's dtype can hold."""
    limit = torch.finfo(tensors[0].dtype).max / 2
    holds = ~(tensors[1].isfinite() & (tensors[1].abs() > limit))
    return [x[holds] for x in tensors]


def explore(op: str, backend: str) -> None:
    served = []

    @settings(
        max_examples=EXAMPLES[backend] * (34 if FULL else 1),
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink) if FULL else (Phase.generate,),
        report_multiple_bugs=False,
    )
    @given(calls(op, backend))
    def judged(call: Call) -> None:
        served.append(check(call, backend))

    judged()
    assert sum(served) > len(served) / 2, "most calls were refused: the strategy draws what is bad"


@pytest.mark.parametrize("op", MAKERS)
def test_the_reference(op):
    explore(op, "reference")


@pytest.mark.parametrize("op", MAKERS)
def test_the_cpu(op):
    explore(op, "cpu")


@pytest.mark.parametrize("op", [op for op in MAKERS if op not in WITHOUT_KERNELS["triton"]])
def test_triton(op, triton_on_cpu):
    explore(op, "triton")


@pytest.fixture(scope="module")
def emulated():
    with Kernels(build("plain")).installed():
        yield


@pytest.mark.parametrize("op", sorted(WITH_CUDA))
def test_cuda(op, emulated):
    explore(op, "cuda")


@pytest.mark.parametrize("shift", [0.0, 0.1, float("nan")])
def test_a_wrong_result_is_seen(shift):
    def run(tensors: Tensors, backend: str) -> tuple[Tensor, ...]:
        out, lse = ff.attention(**tensors, return_lse=True, backend=backend)
        return (out + shift if backend == "cpu" else out), lse

    torch.manual_seed(0)
    call = Call("attention", run, {name: torch.randn(1, 2, 33, 24) for name in "qkv"})
    if shift == 0:
        assert check(call, "cpu")
    else:
        with pytest.raises(AssertionError, match="result 0"):
            check(call, "cpu")


def test_a_refusal_of_one_backend_alone_is_seen():
    def run(tensors: Tensors, backend: str) -> tuple[Tensor, ...]:
        if backend == "cpu":
            raise ValueError("q: got something, expected something else")
        return (ff.attention(**tensors, backend=backend),)

    call = Call("attention", run, {name: torch.randn(1, 2, 3, 8) for name in "qkv"})
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        check(call, "cpu")
