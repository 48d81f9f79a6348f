"""The public ops on the CUDA C++ kernels, which the emulator executes."""

import pytest
import torch
from emulated import Kernels
from emulator_build import build
from fakes import FakesAgree

import fuseformer as ff
from fuseformer.testing import assert_close_to_reference

BF16, FP16 = torch.bfloat16, torch.float16


@pytest.fixture(scope="module")
def kernels():
    kernels = Kernels(build("plain"))
    with kernels.installed():
        yield kernels


def heads(*shape, dtype=BF16):
    """Return (batch, heads, rows, head_dim), in memory (batch, rows, heads, head_dim)."""
    batch, count, rows, dim = shape
    return torch.randn(batch, rows, count, dim).to(dtype).transpose(1, 2)


def gradients(call, inputs):
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = call(*leaves)
    dout = torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def check(call, inputs):
    got = gradients(lambda *x: call(*x, backend="cuda"), inputs)
    low = gradients(lambda *x: call(*x, backend="reference"), inputs)
    exact = gradients(lambda *x: call(*x, backend="reference"), [x.double() for x in inputs])
    for place, (a, b, e) in enumerate(zip(got, low, exact, strict=True)):
        assert_close_to_reference(a, e, b, factor=3.0 if place else 2.0)


LENGTHS = torch.tensor([33, 0], dtype=torch.int32)
OFFSETS = torch.tensor([0, 20, 20, 53], dtype=torch.int32)


def dense(q, k, v, backend):
    options = {"causal": "bottom_right", "window": (40, -1), "dropout_p": 0.2, "seed": 3}
    return ff.attention(q, k, v, key_lengths=LENGTHS, backend=backend, **options)


def packed(q, k, v, backend):
    options = {"causal": True, "dropout_p": 0.2, "seed": 3}
    return ff.varlen_attention(q, k, v, OFFSETS, OFFSETS, 33, 33, backend=backend, **options)


INPUTS = {
    "dense": (dense, lambda: [heads(2, 4, 37, 64), *(heads(2, 2, 50, 64) for _ in range(2))]),
    "packed": (
        packed,
        lambda: [torch.randn(53, 4, 32).to(FP16), *torch.randn(2, 53, 2, 32).to(FP16).unbind(0)],
    ),
}


@pytest.mark.parametrize("name", INPUTS)
def test_against_the_oracle_with_gradients(name, kernels):
    torch.manual_seed(0)
    call, inputs = INPUTS[name]
    check(call, inputs())


@pytest.mark.parametrize("name", INPUTS)
def test_results_lie_as_fakes_promise(name, kernels):
    call, inputs = INPUTS[name]
    agree = FakesAgree()
    with agree:
        gradients(lambda *x: call(*x, "cuda"), inputs())
    assert len(agree.seen) == 2


def test_rows_that_are_not_aligned_are_copied(kernels):
    torch.manual_seed(0)
    odd = torch.randn(1, 2, 21, 33).to(BF16)[..., 1:]
    shifted = torch.randn(1 + 1 * 2 * 21 * 32).to(BF16)[1:].view(1, 2, 21, 32)
    expanded = torch.randn(1, 1, 21, 32).to(BF16).expand(1, 2, 21, 32)
    wide = torch.randn(1, 2, 21, 33).to(BF16)[..., :32]  # begins aligned, its other rows do not
    for q in (odd, wide):
        check(
            lambda q, k, v, backend: ff.attention(q, k, v, backend=backend), [q, shifted, expanded]
        )


def test_autocast(kernels):
    q, k, v = torch.randn(3, 1, 2, 20, 32).unbind(0)
    with torch.autocast("cpu", torch.bfloat16), ff.explain() as decisions:
        out = ff.attention(q, k, v, backend="cuda")
    assert out.dtype == BF16
    assert decisions.decisions[0].backend == "cuda"


def arguments(**changes):
    given = {
        "q": torch.zeros(1, 2, 8, 64, dtype=BF16),
        "k": torch.zeros(1, 1, 9, 64, dtype=BF16),
        "v": torch.zeros(1, 1, 9, 64, dtype=BF16),
        "out": torch.zeros(1, 2, 8, 64, dtype=BF16),
        "lse": torch.zeros(1, 2, 8),
        "key_lengths": None,
        "cu_seqlens_q": None,
        "cu_seqlens_k": None,
        "seed": None,
        "max_seqlen_q": 0,
        "max_seqlen_k": 0,
        "window_left": -1,
        "window_right": -1,
        "bottom_right": False,
        "scale": 0.1,
        "dropout_threshold": 0,
        "dropout_scale": 1.0,
    }
    return (given | changes).values()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"q": torch.zeros(2, 8, 64, dtype=BF16)}, r"q: got shape \(2, 8, 64\), expected 4 dim"),
        ({"q": torch.zeros(1, 2, 8, 64)}, "q: got float32, expected bfloat16 or float16"),
        (
            {"k": torch.zeros(1, 3, 9, 64, dtype=BF16)},
            "k: got 3 heads, expected a divisor of q's",
        ),
        ({"v": torch.zeros(1, 1, 8, 64, dtype=BF16)}, r"v: got shape \(1, 1, 8, 64\), expected"),
        ({"v": torch.zeros(1, 1, 9, 64, dtype=FP16)}, "v: got float16, expected bfloat16"),
        ({"k": torch.zeros(1, 1, 9, 65, dtype=BF16)[..., :64]}, "k: got strides .* multiples of 8"),
        ({"out": torch.zeros(1, 2, 64, 8, dtype=BF16).mT}, "out: got stride 8 in the last dim"),
        ({"lse": torch.zeros(1, 2, 8, dtype=FP16)}, "lse: got float16, expected float32"),
        ({"key_lengths": torch.zeros(2, dtype=torch.int32)}, r"key_lengths: got shape \(2,\)"),
        ({"key_lengths": torch.zeros(1, dtype=torch.int64)}, "key_lengths: got int64"),
        ({"seed": torch.zeros(2, dtype=torch.int64)}, "seed: got shape .* expected one number"),
        ({"scale": -1.0}, "scale: got -1.0+, expected a positive"),
        ({"window_left": -2}, "window_left: got -2, expected -1 to"),
    ],
)
def test_the_compiled_op_names_what_is_wrong(changes, said, kernels):
    with pytest.raises(ValueError, match=said):
        kernels.ops.attention_forward(*arguments(**changes))
    kernels.ops.attention_forward(*arguments())


def test_a_head_dim_without_kernels_is_named(kernels):
    wide = dict.fromkeys(("q", "out"), torch.zeros(1, 2, 8, 40, dtype=BF16))
    narrow = dict.fromkeys(("k", "v"), torch.zeros(1, 1, 9, 40, dtype=BF16))
    with pytest.raises(RuntimeError, match="no forward kernel of this head dim"):
        kernels.ops.attention_forward(*arguments(**wide, **narrow))
