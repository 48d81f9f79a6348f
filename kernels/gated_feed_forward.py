"""Gated feed-forward blocks in Triton: the regimes, and the kernels between the vendor's matmuls.

The regimes are those of `feed_forward`, and so is the rule that chooses: what forward saves never
depends on the number of tokens. In the resident regime it saves nothing, in the epilogue regime the
two first products: one elementwise kernel each way does all between them and the last product.

Source: Shazeer, "GLU Variants Improve Transformer", 2020.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .activations import activate
from .common import KernelSpec, dropout_keep, recorded_launches
from .feed_forward import launch_elementwise, saves_pre
from .feed_forward_decode import decode_forward, few_tokens
from .feed_forward_tiles import dropout_arguments
from .gated_feed_forward_resident import enough_tokens, resident_backward, resident_forward

# ------------------------------------------------------------------------------------------------
# Kernels
# ------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["tokens", "threshold"])
def gated_activation_kernel(
    pre_ptr, up_ptr, hidden_ptr, seed_ptr, tokens, threshold, dropout_scale,
    HIDDEN: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Compute ``dropout(activation(pre) * up)`` of one tile.

    Grid: (row blocks, hidden blocks). All three tensors are (tokens, HIDDEN) contiguous.
    """
    row, start = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_H
    rows = row + tl.arange(0, BLOCK_M)[:, None]  # (BLOCK_M, 1)
    units = start + tl.arange(0, BLOCK_H)[None, :]  # (1, BLOCK_H)
    inside = (rows < tokens) & (units < HIDDEN)
    offsets = rows.to(tl.int64) * HIDDEN + units  # (BLOCK_M, BLOCK_H)
    pre = tl.load(pre_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    gate, _ = activate(pre, ACTIVATION)  # (BLOCK_M, BLOCK_H)
    hidden = gate * up  # (BLOCK_M, BLOCK_H)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
        keep = dropout_keep(seed, 0, 0, row, start, threshold, BLOCK_M, BLOCK_H)
        hidden = tl.where(keep, hidden * dropout_scale, 0.0)
    tl.store(hidden_ptr + offsets, hidden.to(hidden_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens", "threshold"])
def gated_activation_gradient_kernel(
    pre_ptr, up_ptr, gradient_ptr, dup_ptr, hidden_ptr, seed_ptr,
    tokens, threshold, dropout_scale,
    HIDDEN: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Turn the gradient of the hidden activations into that of `pre`, in place, and that of `up`.

    Grid: (row blocks, hidden blocks). All tensors are (tokens, HIDDEN) contiguous. `hidden_ptr`
    receives the hidden activations again, for the gradient of w_down.
    """
    row, start = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_H
    rows = row + tl.arange(0, BLOCK_M)[:, None]  # (BLOCK_M, 1)
    units = start + tl.arange(0, BLOCK_H)[None, :]  # (1, BLOCK_H)
    inside = (rows < tokens) & (units < HIDDEN)
    offsets = rows.to(tl.int64) * HIDDEN + units  # (BLOCK_M, BLOCK_H)
    pre = tl.load(pre_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    gradient = tl.load(gradient_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    gate, slope = activate(pre, ACTIVATION)  # (BLOCK_M, BLOCK_H)
    hidden = gate * up  # (BLOCK_M, BLOCK_H)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
        keep = dropout_keep(seed, 0, 0, row, start, threshold, BLOCK_M, BLOCK_H)
        hidden = tl.where(keep, hidden * dropout_scale, 0.0)
        gradient = tl.where(keep, gradient * dropout_scale, 0.0)
    tl.store(hidden_ptr + offsets, hidden.to(hidden_ptr.dtype.element_ty), mask=inside)
    tl.store(dup_ptr + offsets, (gradient * gate).to(dup_ptr.dtype.element_ty), mask=inside)
    dpre = gradient * up * slope  # (BLOCK_M, BLOCK_H)
    tl.store(gradient_ptr + offsets, dpre.to(gradient_ptr.dtype.element_ty), mask=inside)


# ------------------------------------------------------------------------------------------------
# Launchers
# ------------------------------------------------------------------------------------------------


def gated_feed_forward_forward(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    seed: Tensor | None,
    activation: str,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output (T, out) and both first products (T, hidden) for backward.

    `x` is (T, width), `w_gate` and `w_up` (hidden, width), `w_down` (out, hidden), any strides.
    Where `saves_pre` says no, the products come back empty, (0,).
    """
    x, w_gate, w_up, w_down = (t.contiguous() for t in (x, w_gate, w_up, w_down))
    dropout = dropout_arguments(seed, dropout_p)
    saved = saves_pre(x.shape[1], w_down.shape[0], x.dtype)
    nothing = x.new_empty(0)
    if not saved and enough_tokens(x, w_down.shape[0]):
        y = resident_forward(x, w_gate, w_up, w_down, activation, dropout)
        return y, nothing, nothing.clone()
    if few_tokens(x):
        y, pre, up = decode_forward(x, w_gate, None, w_up, w_down, None, activation, dropout, saved)
        if pre is None or up is None:
            return y, nothing, nothing.clone()
        return y, pre, up
    pre, up = F.linear(x, w_gate), F.linear(x, w_up)
    hidden = torch.empty_like(pre)
    arguments = {"up_ptr": up, "hidden_ptr": hidden, "ACTIVATION": activation, **dropout}
    launch_elementwise(gated_activation_kernel, pre, 1, arguments)
    y = F.linear(hidden, w_down)
    return (y, pre, up) if saved else (y, nothing, nothing.clone())


def gated_feed_forward_backward(
    dy: Tensor,
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    gate_pre: Tensor,
    up: Tensor,
    seed: Tensor | None,
    activation: str,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, w_gate, w_up and w_down.

    `dy` is (T, out), `gate_pre` and `up` what forward returned, the rest is forward's.
    """
    dy, x, w_gate, w_up, w_down = (t.contiguous() for t in (dy, x, w_gate, w_up, w_down))
    dropout = dropout_arguments(seed, dropout_p)
    if not saves_pre(x.shape[1], w_down.shape[0], x.dtype):
        if enough_tokens(x, w_down.shape[0]):
            return resident_backward(dy, x, w_gate, w_up, w_down, activation, dropout)
        gate_pre, up = F.linear(x, w_gate), F.linear(x, w_up)
    dgate = dy @ w_down  # (T, hidden), so far the gradient of the hidden activations
    dup, hidden = torch.empty_like(dgate), torch.empty_like(dgate)
    arguments = {
        "up_ptr": up,
        "gradient_ptr": dgate,
        "dup_ptr": dup,
        "hidden_ptr": hidden,
        "ACTIVATION": activation,
        **dropout,
    }
    launch_elementwise(gated_activation_gradient_kernel, gate_pre, 1, arguments)
    dx = torch.addmm(dgate @ w_gate, dup, w_up)
    return dx, dgate.t() @ x, dup.t() @ x, dy.t() @ hidden


# ------------------------------------------------------------------------------------------------
# Specs
# ------------------------------------------------------------------------------------------------


def kernel_specs(family: str) -> Iterator[KernelSpec]:
    """Yield the launches of representative calls with the configs of an architecture family.

    Every width class of the resident regime with and without dropout, few rows, and the epilogue.
    """
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    many = 1 << 15
    cases = [(bf16, many, width, "silu", 0.0) for width in (32, 64, 128, 256, 512)]
    cases += [(bf16, many, width, "gelu", 0.1) for width in (32, 64, 128, 256, 512)]
    cases += [(fp16, many, width, "gelu_tanh", 0.0) for width in (40, 200, 512)]
    cases += [(fp16, many, width, "relu", 0.1) for width in (128, 256)]
    cases += [(fp16, 16, 1000, "silu", 0.0), (bf16, 16, 1024, "gelu", 0.1)]
    cases += [(fp32, many, 256, "silu", 0.1), (fp32, many, 256, "relu", 0.0)]
    for dtype, tokens, width, activation, dropout_p in cases:
        x, w_gate, w_up, w_down = (
            torch.empty(shape, dtype=dtype, device="meta")
            for shape in ((tokens, width), *[(4 * width, width)] * 2, (width, 4 * width))
        )
        seed = torch.empty((), dtype=torch.int64, device="meta") if dropout_p else None
        options = (seed, activation, dropout_p)
        with recorded_launches(family) as specs:
            y, pre, up = gated_feed_forward_forward(x, w_gate, w_up, w_down, *options)
            gated_feed_forward_backward(y, x, w_gate, w_up, w_down, pre, up, *options)
        yield from specs
