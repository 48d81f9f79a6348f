"""Gated feed-forward blocks in Triton, resident regime: hidden activations live in registers only.

The walk of `feed_forward_resident` with the tiles of both first products side by side. Backward
recomputes them and hands three hidden tiles, a chunk of tokens at a time, to the vendor's matmul
for the weight gradients. Eight products in all, and no recomputation but that of the first two.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import activate
from .common import dropout_keep
from .feed_forward_tiles import (
    Config,
    ResidentConfigs,
    launch_resident,
    load_block,
    load_tokens,
    run_resident,
    store_block,
)

# ------------------------------------------------------------------------------------------------
# Configs
# ------------------------------------------------------------------------------------------------

# Under this many programs most of a large GPU idles while each walks the whole hidden dimension.
_MIN_PROGRAMS = 64

# Hidden gradients and activations that backward materialises at once.
_CHUNK_BYTES = 1 << 28

# By the padded width; all compile without spills.
_FORWARD_CONFIGS: dict[int, Config] = {
    32: (64, 64, 4, 3),
    64: (64, 64, 4, 2),
    128: (64, 64, 4, 2),
    256: (64, 32, 4, 2),
}
_BACKWARD_CONFIGS: dict[int, Config] = {
    32: (64, 32, 4, 2),
    64: (64, 32, 4, 2),
    128: (64, 32, 4, 2),
    256: (32, 32, 4, 2),
}

# With dropout, whose random words take registers too.
_DROPPING_CONFIGS: dict[int, Config] = {}

# What differs from the tables above in a family: code for sm_86 takes more registers, and so do
# four warps with a wgmma as wide as the output.
_FORWARD_EXCEPTIONS: dict[str, dict[int, Config]] = {
    "sm_86": {128: (64, 32, 4, 2), 256: (32, 32, 4, 2)},
    "sm_90": {256: (64, 32, 8, 2)},
}
_BACKWARD_EXCEPTIONS: dict[str, dict[int, Config]] = {}

_CONFIGS = ResidentConfigs(
    _FORWARD_CONFIGS,
    _BACKWARD_CONFIGS,
    _DROPPING_CONFIGS,
    _FORWARD_EXCEPTIONS,
    _BACKWARD_EXCEPTIONS,
)


# ------------------------------------------------------------------------------------------------
# Device helpers
# ------------------------------------------------------------------------------------------------


@triton.jit
def _gated_blocks(
    x, w_gate_ptr, w_up_ptr, w_down_ptr, start,
    WIDTH: tl.constexpr, HIDDEN: tl.constexpr, OUT: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Return both first products of the hidden units from `start` on, and their weight blocks."""
    RAGGED: tl.constexpr = HIDDEN % BLOCK_H != 0
    left = HIDDEN - start
    w_gate = load_block(
        w_gate_ptr + start * WIDTH, WIDTH, left, WIDTH, BLOCK_H, BLOCK_W, RAGGED, WIDTH != BLOCK_W
    )  # (BLOCK_H, BLOCK_W)
    w_up = load_block(
        w_up_ptr + start * WIDTH, WIDTH, left, WIDTH, BLOCK_H, BLOCK_W, RAGGED, WIDTH != BLOCK_W
    )  # (BLOCK_H, BLOCK_W)
    w_down = load_block(
        w_down_ptr + start, HIDDEN, OUT, left, BLOCK_O, BLOCK_H, OUT != BLOCK_O, RAGGED
    )  # (BLOCK_O, BLOCK_H)
    gate_pre = tl.dot(x, tl.trans(w_gate))  # (BLOCK_M, BLOCK_H)
    up = tl.dot(x, tl.trans(w_up))  # (BLOCK_M, BLOCK_H)
    return gate_pre, up, w_gate, w_up, w_down


# ------------------------------------------------------------------------------------------------
# Kernels
# ------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["tokens", "threshold"])
def gated_feed_forward_resident_kernel(
    x_ptr, w_gate_ptr, w_up_ptr, w_down_ptr, y_ptr, seed_ptr,
    tokens, threshold, dropout_scale,
    WIDTH: tl.constexpr, HIDDEN: tl.constexpr, OUT: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_O: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Compute the output rows of one block of tokens.

    Grid: (token blocks,). All tensors are contiguous: x (tokens, WIDTH), w_gate and w_up (HIDDEN,
    WIDTH), w_down (OUT, HIDDEN), y (tokens, OUT).
    """
    row = tl.program_id(0) * BLOCK_M
    x = load_tokens(x_ptr + row.to(tl.int64) * WIDTH, tokens - row, WIDTH, BLOCK_M, BLOCK_W)
    seed = 0
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    acc = tl.zeros((BLOCK_M, BLOCK_O), tl.float32)
    for start in range(0, HIDDEN, BLOCK_H):
        gate_pre, up, _, _, w_down = _gated_blocks(
            x, w_gate_ptr, w_up_ptr, w_down_ptr, start,
            WIDTH, HIDDEN, OUT, BLOCK_W, BLOCK_O, BLOCK_H,
        )  # fmt: skip
        gate, _ = activate(gate_pre, ACTIVATION)  # (BLOCK_M, BLOCK_H)
        hidden = gate * up  # (BLOCK_M, BLOCK_H)
        if seed_ptr is not None:
            keep = dropout_keep(seed, 0, 0, row, start, threshold, BLOCK_M, BLOCK_H)
            hidden = tl.where(keep, hidden * dropout_scale, 0.0)
        acc = tl.dot(hidden.to(w_down.dtype), tl.trans(w_down), acc)
    y_ptr += row.to(tl.int64) * OUT
    store_block(y_ptr, acc, OUT, tokens - row, OUT, OUT != BLOCK_O)


@triton.jit(do_not_specialize=["first_row", "tokens", "threshold"])
def gated_feed_forward_resident_gradient_kernel(
    dy_ptr, x_ptr, w_gate_ptr, w_up_ptr, w_down_ptr, dx_ptr, dgate_ptr, dup_ptr, hidden_ptr,
    seed_ptr, first_row, tokens, threshold, dropout_scale,
    WIDTH: tl.constexpr, HIDDEN: tl.constexpr, OUT: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_O: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Compute dx of one block of tokens, and the hidden tiles that the weight gradients need.

    Grid: (token blocks,). The pointers begin at token `first_row` of the call, which the dropout
    mask needs to know. dgate, dup and hidden are (tokens, HIDDEN) contiguous.
    """
    block = tl.program_id(0).to(tl.int64)
    row = tl.program_id(0) * BLOCK_M
    left = tokens - row
    x = load_tokens(x_ptr + block * BLOCK_M * WIDTH, left, WIDTH, BLOCK_M, BLOCK_W)
    dy = load_tokens(dy_ptr + block * BLOCK_M * OUT, left, OUT, BLOCK_M, BLOCK_O)
    dgate_ptr += block * BLOCK_M * HIDDEN
    dup_ptr += block * BLOCK_M * HIDDEN
    hidden_ptr += block * BLOCK_M * HIDDEN
    seed = 0
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    RAGGED: tl.constexpr = HIDDEN % BLOCK_H != 0
    acc = tl.zeros((BLOCK_M, BLOCK_W), tl.float32)
    for start in range(0, HIDDEN, BLOCK_H):
        gate_pre, up, w_gate, w_up, w_down = _gated_blocks(
            x, w_gate_ptr, w_up_ptr, w_down_ptr, start,
            WIDTH, HIDDEN, OUT, BLOCK_W, BLOCK_O, BLOCK_H,
        )  # fmt: skip
        dhidden = tl.dot(dy, w_down)  # (BLOCK_M, BLOCK_H)
        gate, slope = activate(gate_pre, ACTIVATION)  # (BLOCK_M, BLOCK_H)
        hidden = gate * up  # (BLOCK_M, BLOCK_H)
        if seed_ptr is not None:
            keep = dropout_keep(seed, 0, 0, first_row + row, start, threshold, BLOCK_M, BLOCK_H)
            hidden = tl.where(keep, hidden * dropout_scale, 0.0)
            dhidden = tl.where(keep, dhidden * dropout_scale, 0.0)
        store_block(hidden_ptr + start, hidden, HIDDEN, left, HIDDEN - start, RAGGED)
        dup = (dhidden * gate).to(x.dtype)  # (BLOCK_M, BLOCK_H)
        store_block(dup_ptr + start, dup, HIDDEN, left, HIDDEN - start, RAGGED)
        acc = tl.dot(dup, w_up, acc)
        dgate = (dhidden * up * slope).to(x.dtype)  # (BLOCK_M, BLOCK_H)
        store_block(dgate_ptr + start, dgate, HIDDEN, left, HIDDEN - start, RAGGED)
        acc = tl.dot(dgate, w_gate, acc)
    dx_ptr += block * BLOCK_M * WIDTH
    store_block(dx_ptr, acc, WIDTH, left, WIDTH, WIDTH != BLOCK_W)


# ------------------------------------------------------------------------------------------------
# Launchers
# ------------------------------------------------------------------------------------------------


def enough_tokens(x: Tensor, out_width: int) -> bool:
    """Return whether the blocks of tokens of `x` (T, width) occupy a GPU in this regime."""
    return x.shape[0] >= _MIN_PROGRAMS * _CONFIGS.of_forward(x, out_width)[0]


def resident_forward(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    activation: str,
    dropout: dict[str, object],
) -> Tensor:
    """Return the output (T, out) of contiguous tensors; `dropout` holds arguments of the kernel."""
    hidden, out = w_gate.shape[0], w_down.shape[0]
    y = x.new_empty(x.shape[0], out)
    arguments = {
        "w_gate_ptr": w_gate,
        "w_up_ptr": w_up,
        "w_down_ptr": w_down,
        "y_ptr": y,
        "ACTIVATION": activation,
        **dropout,
    }
    kernel = gated_feed_forward_resident_kernel
    run_resident(
        kernel,
        _CONFIGS.of_forward(x, out),
        {**arguments, "WIDTH": x.shape[1], "HIDDEN": hidden, "OUT": out},
        (x.shape[0],),
        lambda config: launch_resident(kernel, config, x, hidden, out, arguments),
    )
    return y


def resident_backward(
    dy: Tensor,
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    activation: str,
    dropout: dict[str, object],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, w_gate, w_up and w_down; arguments as in `resident_forward`."""
    return run_resident(
        gated_feed_forward_resident_gradient_kernel,
        _CONFIGS.of_backward(x, w_down.shape[0], dropout["seed_ptr"] is not None),
        {
            "x_ptr": x,
            "WIDTH": x.shape[1],
            "HIDDEN": w_gate.shape[0],
            "OUT": w_down.shape[0],
            "ACTIVATION": activation,
            **dropout,
        },
        (x.shape[0],),
        lambda config: _gradients(config, dy, x, w_gate, w_up, w_down, activation, dropout),
    )


def _gradients(
    config: Config,
    dy: Tensor,
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    activation: str,
    dropout: dict[str, object],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what `resident_backward` does, with the given config."""
    tokens, hidden, out = x.shape[0], w_gate.shape[0], w_down.shape[0]
    chunk = max(1, _CHUNK_BYTES // (3 * hidden * x.element_size() * config[0])) * config[0]
    dx = torch.empty_like(x)
    sums: list[Tensor] = []
    for start in range(0, max(1, tokens), chunk):
        rows = slice(start, min(start + chunk, tokens))
        dgate, dup, act = (x.new_empty(rows.stop - rows.start, hidden) for _ in range(3))
        arguments = {
            "dy_ptr": dy[rows],
            "w_gate_ptr": w_gate,
            "w_up_ptr": w_up,
            "w_down_ptr": w_down,
            "dx_ptr": dx[rows],
            "dgate_ptr": dgate,
            "dup_ptr": dup,
            "hidden_ptr": act,
            "first_row": start,
            "ACTIVATION": activation,
            **dropout,
        }
        kernel = gated_feed_forward_resident_gradient_kernel
        launch_resident(kernel, config, x[rows], hidden, out, arguments)
        # A single chunk needs no wider sum; further ones add up in float32.
        parts = [dgate.t() @ x[rows], dup.t() @ x[rows], dy[rows].t() @ act]
        if sums:
            parts = [total.float().add_(part) for total, part in zip(sums, parts, strict=True)]
        sums = parts
    dw_gate, dw_up, dw_down = (total.to(x.dtype) for total in sums)
    return dx, dw_gate, dw_up, dw_down
