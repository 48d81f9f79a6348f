"""The public ops on Triton: executed on the CPU, and as custom ops in the interpreter."""

import pytest
import torch
from interpreted import run_interpreted
from op_calls import CALLS

import fuseformer as ff
from fuseformer.testing import assert_close_to_reference

pytest.importorskip("ttsem")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_public_op_on_triton_against_the_oracle(name, dtype, triton_on_cpu):
    call, inputs = CALLS[name]
    torch.manual_seed(0)
    tensors = [t.to(dtype) for t in inputs()]
    results = []
    runs = (("triton", dtype), ("reference", torch.float64), ("reference", dtype))
    with ff.explain() as decisions:
        for backend, precision in runs:
            torch.manual_seed(1)
            leaves = [t.to(precision, copy=True).requires_grad_() for t in tensors]
            out = call(*leaves, backend)
            weight = torch.randn(out.shape, dtype=torch.float64)
            results.append((out, *torch.autograd.grad((out * weight).sum(), leaves)))
    assert decisions.decisions[0].backend == "triton"
    for i, (a, e, low) in enumerate(zip(*results, strict=True)):
        assert_close_to_reference(a, e, low, factor=3 if i else 2, name=f"{name}, result {i}")


INTERPRETED = """
import torch, fuseformer as ff
from torch.library import opcheck

def leaf(*shape):
    return torch.randn(*shape, requires_grad=True)

ops = torch.ops.fuseformer
none = None
q, k, v = leaf(1, 2, 17, 16), leaf(1, 1, 20, 16), leaf(1, 1, 20, 16)
opcheck(ops.attention.default, (q, k, v, none, none, none, none, none, torch.tensor(3),
        "top_left", -1, -1, 0.0, 0.25, 0.1, "triton"))
opcheck(ops.attention.default, (q, k, v, leaf(2, 17, 20), none, none, torch.ones(2), leaf(2),
        torch.tensor(3), "top_left", 9, -1, 5.0, 0.25, 0.1, "triton"))
packed, ends = leaf(17, 2, 16), torch.tensor([0, 5, 17], dtype=torch.int32)
for extras in ((none, none, none), (leaf(2, 12, 12), torch.ones(2), leaf(2))):
    opcheck(ops.varlen_attention.default, (packed, packed, packed, ends, ends, 12, 12, *extras,
            torch.tensor(3), "top_left", 9, -1, 5.0, 0.25, 0.1, "triton"))
opcheck(ops.feed_forward.default, (leaf(17, 16), leaf(32, 16), leaf(32), leaf(16, 32), leaf(16),
        none, "gelu", 0.0, {saves_pre}, True, "triton"))
opcheck(ops.gated_feed_forward.default, (leaf(17, 16), leaf(32, 16), leaf(32, 16), leaf(16, 32),
        none, "silu", 0.0, {saves_pre}, True, "triton"))
opcheck(ops.rotary.default, (q, leaf(1, 1, 17, 16), *torch.rand(2, 17, 6), False, True, "triton"))
opcheck(ops.rotary_inplace.default, (torch.rand(1, 2, 17, 16), torch.rand(1, 1, 17, 16),
        *torch.rand(2, 17, 6), False, "triton"))
for rms in (False, True):
    opcheck(ops.add_norm.default, (leaf(9, 16), leaf(9, 16), leaf(16), none if rms else leaf(16),
            torch.tensor(3) if rms else none, rms, rms, 1e-5, 0.1 * rms, "triton"))
opcheck(ops.linear_cross_entropy.default, (leaf(9, 16), leaf(12, 16), none,
        torch.arange(9), -100, 0.0, 0.0, 0.1, "mean", True, none, "triton"))

cache, lengths = k.detach(), torch.tensor([19], dtype=torch.int32)
few = q.detach()[:, :, :3]
opcheck(ops.decode_attention.default, (few, cache, cache, lengths, none, none, none, True, 5, -1,
        0.0, 0.25, "triton"))

@torch.compile(fullgraph=True, backend="aot_eager")
def decode(q, k, v):
    return ff.decode_attention(q, k, v, lengths, backend="triton")

torch.testing.assert_close(
    decode(few, cache, cache), ff.decode_attention(few, cache, cache, lengths, backend="reference")
)

@torch.compile(fullgraph=True, backend="aot_eager")
def attend(q, k, v):
    return ff.attention(q, k, v, causal=True, backend="triton")

expected = ff.attention(q, k, v, causal=True, backend="reference")
torch.testing.assert_close(attend(q, k, v), expected)
gradients = torch.autograd.grad(attend(q, k, v).sum(), (q, k, v))
for a, b in zip(gradients, torch.autograd.grad(expected.sum(), (q, k, v))):
    torch.testing.assert_close(a, b)

def attend_packed(q, k, v, bias, ends, longest, backend):
    return ff.varlen_attention(
        q, k, v, ends, ends, longest, longest, causal=True, bias=bias, backend=backend
    )

compiled = torch.compile(attend_packed, fullgraph=True, backend="aot_eager", dynamic=True)
for longest, other in ((12, 7), (20, 9)):
    rows = longest + other
    leaves = leaf(rows, 2, 16), leaf(rows, 1, 16), leaf(rows, 1, 16), leaf(2, longest, longest)
    ends = torch.tensor([0, other, rows], dtype=torch.int32)
    runs = (compiled, "triton"), (attend_packed, "reference")
    results = [run(*leaves, ends, longest, backend) for run, backend in runs]
    torch.testing.assert_close(*results)
    for a, b in zip(*(torch.autograd.grad(y.sum(), leaves) for y in results)):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)

def block(x, weight, q, k, angle, backend):
    y, residual = ff.add_rms_norm(x, x + 1, weight, eps=1e-5, backend=backend)
    y = ff.add_layer_norm(y, residual, weight, None, backend=backend)
    loss = ff.linear_cross_entropy(y, x, torch.arange(len(x)), z_loss=0.1, backend=backend)
    turned = ff.rotary(q, k, angle.cos(), angle.sin(), backend=backend)
    with torch.no_grad():
        moved = ff.rotary(q * 2, k * 2, angle.cos(), angle.sin(), inplace=True, backend=backend)
    return loss + sum((a * b).sum() for a, b in zip(turned, moved))

compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=True)
for rows in (9, 14):
    leaves = leaf(rows, 16), leaf(16), leaf(1, 2, rows, 16), leaf(1, 1, rows, 16)
    angle = torch.rand(rows, 6)
    results = [f(*leaves, angle, b) for f, b in ((compiled, "triton"), (block, "reference"))]
    torch.testing.assert_close(*results)
    for a, b in zip(*(torch.autograd.grad(y, leaves) for y in results)):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
print("interpreted")
"""


def test_custom_ops_around_triton_kernels_pass_opcheck_and_compile():
    from fuseformer.kernels.feed_forward import saves_pre

    code = INTERPRETED.format(saves_pre=saves_pre(16, 16, torch.float32))
    assert "interpreted" in run_interpreted(code)
