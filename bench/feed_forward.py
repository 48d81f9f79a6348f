"""The feed-forward block against the same block from torch.nn.functional.

FLOP: 12 * T * width * hidden (forward 4, backward 8).
"""

import torch
import torch.nn.functional as F

import fuseformer as ff

from .timer import Candidate, Result, Row, compare, verify

FLOP_FORMULA = "12 * T * width * hidden (forward 4, backward 8)"


def run(quick: bool, device: str, dtype: torch.dtype) -> list[Row]:
    """Return the timings of every activation."""
    tokens, width = (64, 32) if quick else (2048, 512)
    rows = []
    for activation in ("relu", "gelu"):
        torch.manual_seed(0)
        x = torch.randn(tokens, width)
        w1, w2 = torch.randn(4 * width, width) / width**0.5, torch.randn(width, 4 * width) / width
        inputs = [x, w1, torch.randn(4 * width), w2, torch.randn(width)]
        inputs = [t.to(device, dtype) for t in inputs]
        dy = torch.randn(tokens, width).to(device, dtype)

        def eager(x, w1, b1, w2, b2, activation=activation):
            return F.linear(getattr(F, activation)(F.linear(x, w1, b1)), w2, b2)

        def fused(x, w1, b1, w2, b2, activation=activation):
            return ff.feed_forward(x, w1, b1, w2, b2, activation=activation)

        def call(function, tensors: list[torch.Tensor], gradient: torch.Tensor) -> Result:
            leaves = [t.detach().requires_grad_() for t in tensors]
            y = function(*leaves)
            return (y.detach(), *torch.autograd.grad(y, leaves, gradient))

        candidates = [
            Candidate("torch.nn.functional", lambda f=eager, i=inputs, g=dy: call(f, i, g)),
            Candidate("fuseformer", lambda f=fused, i=inputs, g=dy: call(f, i, g)),
        ]
        wide = [t.double() for t in inputs]
        verify(
            candidates, lambda f=eager, w=wide, g=dy: call(f, w, g.double()), candidates[0].run()
        )
        rows += compare(
            f"{activation}, forward+backward {tokens}x{width}x{4 * width}",
            candidates,
            flops=12 * tokens * width * 4 * width,
            repetitions=3 if quick else 25,
            device=device,
        )
    return rows
