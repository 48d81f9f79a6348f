"""Ops under torch.compile: one graph, and no new one for what may change."""

import pytest
import torch
import torch._dynamo.testing

import fuseformer as ff
from fuseformer.testing import assert_close_to_reference


@pytest.mark.parametrize("backend", [None, "reference"])
def test_compiles_without_graph_breaks_and_without_recompiling(backend):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True, dynamic=True)
    def attend(q, k, v):
        return ff.attention(q * 2, k, v, causal=True, backend=backend)

    for length in (16, 24, 40):
        compiled = counter.frame_count
        q, k, v = (torch.randn(2, 2, length, 8, requires_grad=True) for _ in range(3))
        out = attend(q, k, v)
        expected = ff.attention(q * 2, k, v, causal=True)
        assert_close_to_reference(out, expected, expected)
        got = torch.autograd.grad(out.sum(), (q, k, v))
        for a, b in zip(got, torch.autograd.grad(expected.sum(), (q, k, v)), strict=True):
            assert_close_to_reference(a, b, b)
        if backend is None and length > 16:
            assert counter.frame_count == compiled


@pytest.mark.parametrize("op", ["attention", "varlen_attention", "decode_attention"])
def test_compiles_with_a_scale_that_changes(op):
    """The second value makes it a symbol of the compiled graph."""
    torch._dynamo.reset()
    q = torch.randn(2, 2, 4, 8)
    offsets, lengths = (torch.tensor(n, dtype=torch.int32) for n in ([0, 3, 4], [4, 2]))

    def call(q, scale):
        if op == "varlen_attention":
            q = q[0].transpose(0, 1)
            return ff.varlen_attention(q, q, q, offsets, offsets, 3, 3, scale=scale)
        if op == "decode_attention":
            return ff.decode_attention(q, q, q, lengths, scale=scale)
        return ff.attention(q, q, q, scale=scale)

    compiled = torch.compile(call, backend="eager", fullgraph=True)
    for scale in (0.1, 0.2, 0.3):
        assert torch.allclose(compiled(q, scale), call(q, scale), atol=1e-6)
