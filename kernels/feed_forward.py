"""Feed-forward blocks in Triton: the regimes, and the epilogue between the vendor's matmuls.

Two regimes, chosen by dtype and widths alone, so that what forward saves never depends on the
number of tokens:

- resident, for 16-bit blocks up to 256 wide: both products of a block of tokens in one kernel; the
  hidden activations never reach memory and backward recomputes them.
- epilogue, for all others: the vendor's matmuls, whose speed at those sizes a portable kernel does
  not reach, and one elementwise kernel in place of activation, dropout and the sum for the bias
  gradient. Where `linear_activation` says that it pays, the first product ends in the activation
  instead. float32 is always here: without 16-bit tensor cores the vendor's products win.

Up to 16 tokens in 16-bit dtypes go forward through `feed_forward_decode`, which saves the same.

Source: Vaswani et al., "Attention Is All You Need", 2017, equation 2; the resident loop is that of
Dao, "FlashAttention-2", 2023, with an activation in place of softmax.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from . import linear_activation
from .activations import activate
from .common import KernelSpec, dropout_keep, launch, recorded_launches
from .feed_forward_decode import decode_forward, few_tokens
from .feed_forward_resident import enough_tokens, resident_backward, resident_forward
from .feed_forward_tiles import MAX_WIDTH, dropout_arguments

# ------------------------------------------------------------------------------------------------
# Configs
# ------------------------------------------------------------------------------------------------

# Sixteen rows are one patch of dropout words; 128 columns of 16-bit values fill cache lines.
_BLOCK_M, _BLOCK_H, _NUM_WARPS = 16, 128, 4

# Row blocks that one program of the gradient kernel sums over: the partial sums of the bias
# gradient are then 1/64 of what the kernel reads.
_BLOCKS_PER_PROGRAM = 8


def saves_pre(width: int, out_width: int, dtype: torch.dtype) -> bool:
    """Return whether forward saves the pre-activation; in the resident regime it does not."""
    return dtype.itemsize != 2 or max(width, out_width) > MAX_WIDTH


# ------------------------------------------------------------------------------------------------
# Kernels
# ------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["tokens", "threshold"])
def activation_kernel(
    pre_ptr, act_ptr, seed_ptr, tokens, threshold, dropout_scale,
    HIDDEN: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Compute ``dropout(activation(pre))`` of one tile; `act_ptr` may be `pre_ptr`.

    Grid: (row blocks, hidden blocks). Both tensors are (tokens, HIDDEN) contiguous.
    """
    row, start = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_H
    rows = row + tl.arange(0, BLOCK_M)[:, None]  # (BLOCK_M, 1)
    units = start + tl.arange(0, BLOCK_H)[None, :]  # (1, BLOCK_H)
    inside = (rows < tokens) & (units < HIDDEN)
    offsets = rows.to(tl.int64) * HIDDEN + units  # (BLOCK_M, BLOCK_H)
    pre = tl.load(pre_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    act, _ = activate(pre, ACTIVATION)  # (BLOCK_M, BLOCK_H)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
        keep = dropout_keep(seed, 0, 0, row, start, threshold, BLOCK_M, BLOCK_H)
        act = tl.where(keep, act * dropout_scale, 0.0)
    tl.store(act_ptr + offsets, act.to(act_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens", "blocks", "threshold"])
def activation_gradient_kernel(
    pre_ptr, gradient_ptr, act_ptr, db1_ptr, seed_ptr, tokens, blocks, threshold, dropout_scale,
    HIDDEN: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Turn the gradient of the activations into that of `pre`, in place, for `blocks` row blocks.

    Grid: (row blocks / blocks, hidden blocks). Tensors are (tokens, HIDDEN) contiguous. `act_ptr`,
    unless None, receives the activation again, for the gradient of w2; `db1_ptr`, unless None, is
    (row blocks / blocks, HIDDEN) float32 partial sums. `blocks` is no constant, so that the loop
    stays one: unrolled it spills.
    """
    group, start = tl.program_id(0), tl.program_id(1) * BLOCK_H
    units = start + tl.arange(0, BLOCK_H)  # (BLOCK_H,)
    seed = 0
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    total = tl.zeros((BLOCK_H,), tl.float32)
    for block in range(blocks):
        row = (group * blocks + block) * BLOCK_M
        rows = row + tl.arange(0, BLOCK_M)[:, None]  # (BLOCK_M, 1)
        inside = (rows < tokens) & (units[None, :] < HIDDEN)
        offsets = rows.to(tl.int64) * HIDDEN + units[None, :]  # (BLOCK_M, BLOCK_H)
        pre = tl.load(pre_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        gradient = tl.load(gradient_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        act, slope = activate(pre, ACTIVATION)  # (BLOCK_M, BLOCK_H)
        if seed_ptr is not None:
            keep = dropout_keep(seed, 0, 0, row, start, threshold, BLOCK_M, BLOCK_H)
            act = tl.where(keep, act * dropout_scale, 0.0)
            gradient = tl.where(keep, gradient * dropout_scale, 0.0)
        gradient *= slope
        total += tl.sum(gradient, 0)
        tl.store(gradient_ptr + offsets, gradient.to(gradient_ptr.dtype.element_ty), mask=inside)
        if act_ptr is not None:
            tl.store(act_ptr + offsets, act.to(act_ptr.dtype.element_ty), mask=inside)
    if db1_ptr is not None:
        tl.store(db1_ptr + group.to(tl.int64) * HIDDEN + units, total, mask=units < HIDDEN)


# ------------------------------------------------------------------------------------------------
# Launchers
# ------------------------------------------------------------------------------------------------


def launch_elementwise(
    kernel: triton.JITFunction, pre: Tensor, blocks: int, arguments: dict[str, object]
) -> None:
    """Launch over the tiles of `pre` (T, hidden), `blocks` row blocks to a program."""
    tokens, hidden = pre.shape
    arguments = {
        "pre_ptr": pre,
        "tokens": tokens,
        "HIDDEN": hidden,
        "BLOCK_M": _BLOCK_M,
        "BLOCK_H": _BLOCK_H,
        **arguments,
    }
    grid = (triton.cdiv(tokens, blocks * _BLOCK_M), triton.cdiv(hidden, _BLOCK_H))
    launch(kernel, grid, arguments, num_warps=_NUM_WARPS, num_stages=1)


def _epilogue_forward(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str,
    dropout: dict[str, object],
    saved: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return the output (T, out) and what backward needs of the pre-activation (T, hidden).

    The second result may be None unless it is to be `saved`. ReLU without dropout keeps its
    activation instead, in the same memory: the gradient needs no more than its sign, and the
    gradient of w2 needs nothing else.
    """
    keeps_act = activation == "relu" and dropout["seed_ptr"] is None
    if linear_activation.serves(x):
        act, kept = linear_activation.linear_activation(
            x, w1, b1, activation, dropout, saved and not keeps_act
        )
        return F.linear(act, w2, b2), act if keeps_act else kept
    pre = F.linear(x, w1, b1)
    act = pre if keeps_act else torch.empty_like(pre)
    arguments = {"act_ptr": act, "ACTIVATION": activation, **dropout}
    launch_elementwise(activation_kernel, pre, 1, arguments)
    return F.linear(act, w2, b2), pre


def _epilogue_backward(
    dy: Tensor,
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    pre: Tensor,
    activation: str,
    dropout: dict[str, object],
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Return the gradients of x, w1, b1 and w2 given what `_epilogue_forward` saved."""
    gradient = dy @ w2  # (T, hidden)
    keeps_act = activation == "relu" and dropout["seed_ptr"] is None
    act = None if keeps_act else torch.empty_like(pre)
    db1 = None
    if b1 is not None:
        groups = triton.cdiv(pre.shape[0], _BLOCKS_PER_PROGRAM * _BLOCK_M)
        db1 = x.new_empty(groups, pre.shape[1], dtype=torch.float32)
    arguments = {
        "gradient_ptr": gradient,
        "act_ptr": act,
        "db1_ptr": db1,
        "blocks": _BLOCKS_PER_PROGRAM,
        "ACTIVATION": activation,
        **dropout,
    }
    launch_elementwise(activation_gradient_kernel, pre, _BLOCKS_PER_PROGRAM, arguments)
    if db1 is not None:
        db1 = db1.sum(0).to(x.dtype)
    return gradient @ w1, gradient.t() @ x, db1, dy.t() @ (pre if act is None else act)


def feed_forward_forward(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    seed: Tensor | None,
    activation: str,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """Return the output (T, out) and the pre-activation (T, hidden) for backward.

    `x` is (T, width), `w1` (hidden, width), `w2` (out, hidden), any strides. Where `saves_pre` says
    no, the second result is empty (0,); for ReLU without dropout it is clamped at 0.
    """
    x, w1, w2 = x.contiguous(), w1.contiguous(), w2.contiguous()
    dropout = dropout_arguments(seed, dropout_p)
    saved = saves_pre(x.shape[1], w2.shape[0], x.dtype)
    b1, b2 = (None if b is None else b.contiguous() for b in (b1, b2))
    if not saved and enough_tokens(x, w2.shape[0]):
        return resident_forward(x, w1, b1, w2, b2, activation, dropout), x.new_empty(0)
    kept: Tensor | None
    if few_tokens(x):
        y, kept, _ = decode_forward(x, w1, b1, None, w2, b2, activation, dropout, saved)
    else:
        y, kept = _epilogue_forward(x, w1, b1, w2, b2, activation, dropout, saved)
    return y, kept if saved and kept is not None else x.new_empty(0)


def feed_forward_backward(
    dy: Tensor,
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    pre: Tensor,
    seed: Tensor | None,
    activation: str,
    dropout_p: float,
    has_b2: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None]:
    """Return the gradients of x, w1, b1, w2 and b2, that of an absent bias as None.

    `dy` is (T, out), `pre` the second result of forward, the rest is forward's.
    """
    dy, x, w1, w2 = dy.contiguous(), x.contiguous(), w1.contiguous(), w2.contiguous()
    dropout = dropout_arguments(seed, dropout_p)
    saved = saves_pre(x.shape[1], w2.shape[0], x.dtype)
    if not saved and enough_tokens(x, w2.shape[0]):
        b1 = None if b1 is None else b1.contiguous()
        gradients = resident_backward(dy, x, w1, b1, w2, activation, dropout)
    else:
        if not saved:
            pre = F.linear(x, w1, b1)
            if activation == "relu" and dropout["seed_ptr"] is None:
                pre.relu_()
        gradients = _epilogue_backward(dy, x, w1, b1, w2, pre, activation, dropout)
    return (*gradients, dy.sum(0) if has_b2 else None)


# ------------------------------------------------------------------------------------------------
# Specs
# ------------------------------------------------------------------------------------------------


def kernel_specs(family: str) -> Iterator[KernelSpec]:
    """Yield the launches of representative calls with the configs of an architecture family.

    Every width class of the resident regime with and without dropout, and the epilogue; every
    activation in both.
    """
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    cases = [(bf16, width, "relu", 0.1) for width in (32, 64, 96, 128, 256, 512)]
    cases += [(bf16, width, "relu", 0.0) for width in (128, 256)]
    cases += [(bf16, width, "gelu", 0.0) for width in (32, 64, 128, 256, 512)]
    cases += [(fp16, width, "gelu_tanh", 0.1) for width in (40, 200, 512)]
    cases += [(fp16, width, "silu", 0.1) for width in (128, 256)]
    cases += [(fp32, 256, "silu", 0.1), (fp32, 256, "relu", 0.0)]
    # Few rows, and an epilogue between the vendor's matmuls.
    cases += [(fp16, 1000, "silu", 0.1), (bf16, 2048, "relu", 0.0), (bf16, 2048, "gelu", 0.1)]
    for dtype, width, activation, dropout_p in cases:
        tokens = 16 if width == 1000 else 1 << 15
        x, w1, b1, w2, b2 = (
            torch.empty(shape, dtype=dtype, device="meta")
            for shape in (
                (tokens, width),
                (4 * width, width),
                4 * width,
                (width, 4 * width),
                width,
            )
        )
        seed = torch.empty((), dtype=torch.int64, device="meta") if dropout_p else None
        options = (seed, activation, dropout_p)
        with recorded_launches(family) as specs:
            y, pre = feed_forward_forward(x, w1, b1, w2, b2, *options)
            feed_forward_backward(y, x, w1, b1, w2, pre, *options, True)
        yield from specs
