"""Attention against eager maths and PyTorch's scaled_dot_product_attention.

FLOP: 4 * B * H * Sq * Sk * D for the forward, 10 for the five products of the backward; half
of it with a causal mask, and the visible share with padding. Eager maths does the whole.
"""

import math

import torch
import torch.nn.functional as F

import fuseformer as ff

from .timer import Candidate, Result, Row, compare, verify

FLOP_FORMULA = "14 * B * H * Sq * Sk * D (forward 4, backward 10), x 1/2 causal"


def run(quick: bool, device: str, dtype: torch.dtype) -> list[Row]:
    """Return the timings of every case."""
    batch, heads, length, dim = (1, 2, 128, 32) if quick else (1, 8, 1024, 64)
    rows = []
    for case in ("plain", "causal", "half padding"):
        for backward in (False, True):
            rows += _case(case, backward, batch, heads, length, dim, quick, device, dtype)
    return rows


def _case(
    case: str,
    backward: bool,
    batch: int,
    heads: int,
    length: int,
    dim: int,
    quick: bool,
    device: str,
    dtype: torch.dtype,
) -> list[Row]:
    torch.manual_seed(0)
    if case == "half padding":
        batch *= 2
    shape = (batch, heads, length, dim)
    tensors = [torch.randn(shape, device=device, dtype=dtype) for _ in range(3)]
    dout = torch.randn(shape, device=device, dtype=dtype)
    causal, padding, lengths = case == "causal", None, None
    if case == "half padding":
        lengths = torch.full((batch,), length // 2, dtype=torch.int32, device=device)
        padding = torch.arange(length, device=device) >= lengths[:, None]
    visible = torch.ones(length, length, dtype=torch.bool, device=device)
    if causal:
        visible = visible.tril()

    def eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        logits = q @ k.mT / math.sqrt(dim)
        if causal:
            logits = logits.masked_fill(~visible, -math.inf)
        if padding is not None:
            logits = logits.masked_fill(padding[:, None, None], -math.inf)
        return torch.softmax(logits, -1) @ v

    def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        mask = None if padding is None else ~padding[:, None, None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)

    def fused(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return ff.attention(q, k, v, causal=causal, key_lengths=lengths)

    def call(function, inputs: list[torch.Tensor], gradient: torch.Tensor) -> Result:
        leaves = [t.detach().requires_grad_(backward) for t in inputs]
        out = function(*leaves)
        if not backward:
            return (out,)
        return (out.detach(), *torch.autograd.grad(out, leaves, gradient))

    named = {"eager": eager, "sdpa": sdpa, "fuseformer": fused}
    candidates = [
        Candidate(name, lambda f=function: call(f, tensors, dout))
        for name, function in named.items()
    ]
    wide = [t.double() for t in tensors]
    verify(candidates, lambda: call(eager, wide, dout.double()), candidates[0].run())
    share = 0.5 if case != "plain" else 1.0
    flops = (14 if backward else 4) * batch * heads * length * length * dim * share
    label = f"{case}, {'forward+backward' if backward else 'forward'}"
    label += f" {batch}x{heads}x{length}x{dim}"
    return compare(label, candidates, flops=flops, repetitions=3 if quick else 25, device=device)
