"""A matmul in Triton that ends in bias, activation and dropout: the first product of wide blocks.

Beside the vendor's matmul and an elementwise kernel it saves a pass over the hidden activations:
they are neither read again nor, for ReLU without dropout, written twice. On sm_80 a 16-bit element
read is as long as some 300 multiply-adds and the product takes `width` of them an element, so that
it is worth a slower product only while the width is small. Past `MAX_WIDTH`, and on sm_90 and
newer, whose vendor kernels use hardware that plain loads do not reach, the vendor's product stays;
so does the second product, whose output is short.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import activate
from .autotune import tuned, variants
from .common import KernelSpec, device_family, dropout_keep, launch, recorded_launches

# ------------------------------------------------------------------------------------------------
# Configs
# ------------------------------------------------------------------------------------------------

#: Widest input for which the saved pass outweighs a product somewhat slower than the vendor's.
MAX_WIDTH = 1024

# BLOCK_M, BLOCK_N, BLOCK_K, warps, stages by family.
_Config = tuple[int, int, int, int, int]
# ReLU alone, of which only the activation is stored. sm_80: long blocks of one buffer each leave
# room for two programs on a multiprocessor, which cover each other's loads; sm_86 has memory for
# one. 128 x 256 is what two warpgroups of wgmma accumulate.
_LEAN_CONFIGS: dict[str, _Config] = {
    "sm_80": (128, 128, 128, 4, 2),
    "sm_86": (128, 128, 64, 4, 3),
    "sm_90": (128, 256, 64, 8, 3),
    "sm_100": (128, 128, 64, 8, 3),
    "gfx942": (128, 128, 32, 8, 2),
}

# Any more than that: half as many values a thread, or what the epilogue needs would be spilled.
_CONFIGS: dict[str, _Config] = dict.fromkeys(_LEAN_CONFIGS, (128, 128, 64, 8, 3))

# Neighbouring programs share blocks of weights: this many blocks of rows take turns at each.
_GROUP_M = 8


def serves(x: Tensor) -> bool:
    """Return whether this kernel is taken for the first product of `x` (T, width)."""
    family = device_family(x.device)
    width = x.shape[1]
    aligned = width % 16 == 0  # what Triton must know of a size to load 16 bytes at once
    return x.dtype.itemsize == 2 and family in ("sm_80", "sm_86") and aligned and width <= MAX_WIDTH


# ------------------------------------------------------------------------------------------------
# Kernels
# ------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["tokens", "threshold"])
def linear_activation_kernel(
    x_ptr, w_ptr, b_ptr, pre_ptr, act_ptr, seed_ptr,
    tokens, width, hidden, threshold, dropout_scale,
    EVEN_K: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Compute one tile of ``pre = x @ w.T + b`` and of ``act = dropout(activation(pre))``.

    Grid: (row blocks * hidden blocks,). All tensors are contiguous: x (tokens, width), w (hidden,
    width), pre and act (tokens, hidden). `pre_ptr`, unless None, receives pre.
    """
    program = tl.program_id(0)
    blocks_n = tl.cdiv(hidden, BLOCK_N)
    # Sizes are no constants: a loop of known length would be unrolled whole.
    first_block = program // (GROUP_M * blocks_n) * GROUP_M
    height = tl.minimum(tl.cdiv(tokens, BLOCK_M) - first_block, GROUP_M)
    row = (first_block + program % height) * BLOCK_M
    start = program % (GROUP_M * blocks_n) // height * BLOCK_N
    # Rows past either end repeat the last one and are not stored: no mask in the loop.
    rows = tl.minimum(tl.arange(0, BLOCK_M), tokens - row - 1)[:, None]  # (BLOCK_M, 1)
    units = tl.minimum(tl.arange(0, BLOCK_N), hidden - start - 1)[:, None]  # (BLOCK_N, 1)
    columns = tl.arange(0, BLOCK_K)[None, :]  # (1, BLOCK_K)
    x_ptrs = x_ptr + row.to(tl.int64) * width + (rows * width + columns)  # (BLOCK_M, BLOCK_K)
    w_ptrs = w_ptr + start.to(tl.int64) * width + (units * width + columns)  # (BLOCK_N, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, width, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs)  # (BLOCK_M, BLOCK_K)
            w = tl.load(w_ptrs)  # (BLOCK_N, BLOCK_K)
        else:
            x = tl.load(x_ptrs, mask=columns < width - k, other=0.0)  # (BLOCK_M, BLOCK_K)
            w = tl.load(w_ptrs, mask=columns < width - k, other=0.0)  # (BLOCK_N, BLOCK_K)
        acc = tl.dot(x, tl.trans(w), acc)
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K
    rows = row + tl.arange(0, BLOCK_M)[:, None]  # (BLOCK_M, 1)
    units = start + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    if b_ptr is not None:
        acc += tl.load(b_ptr + units, mask=units < hidden, other=0.0).to(tl.float32)[None, :]
    inside = (rows < tokens) & (units < hidden)[None, :]
    offsets = rows.to(tl.int64) * hidden + units[None, :]  # (BLOCK_M, BLOCK_N)
    if pre_ptr is not None:
        tl.store(pre_ptr + offsets, acc.to(pre_ptr.dtype.element_ty), mask=inside)
    act, _ = activate(acc, ACTIVATION)  # (BLOCK_M, BLOCK_N)
    if seed_ptr is not None:
        keep = dropout_keep(tl.load(seed_ptr), 0, 0, row, start, threshold, BLOCK_M, BLOCK_N)
        act = tl.where(keep, act * dropout_scale, 0.0)
    tl.store(act_ptr + offsets, act.to(act_ptr.dtype.element_ty), mask=inside)


# ------------------------------------------------------------------------------------------------
# Launchers
# ------------------------------------------------------------------------------------------------


def linear_activation(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    activation: str,
    dropout: dict[str, object],
    saves_pre: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return the activations (T, hidden), and the product with its bias where `saves_pre`.

    `x` is (T, width), `w` (hidden, width), both contiguous, in a 16-bit dtype; `dropout` holds
    arguments of the kernel.
    """
    act = x.new_empty(x.shape[0], w.shape[0])
    pre = torch.empty_like(act) if saves_pre else None
    lean = activation == "relu" and dropout["seed_ptr"] is None and not saves_pre
    configs = _LEAN_CONFIGS if lean else _CONFIGS
    arguments = {
        "x_ptr": x,
        "w_ptr": w,
        "b_ptr": b,
        "pre_ptr": pre,
        "act_ptr": act,
        "tokens": x.shape[0],
        "width": x.shape[1],
        "hidden": w.shape[0],
        "ACTIVATION": activation,
        "GROUP_M": _GROUP_M,
        **dropout,
    }

    def run(config: _Config) -> None:
        block_m, block_n, block_k, num_warps, num_stages = config
        tiles = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k}
        launch(
            linear_activation_kernel,
            (triton.cdiv(x.shape[0], block_m) * triton.cdiv(w.shape[0], block_n),),
            {**arguments, **tiles, "EVEN_K": x.shape[1] % block_k == 0},
            num_warps=num_warps,
            num_stages=num_stages,
        )

    config = tuned(
        linear_activation_kernel,
        arguments,
        (x.shape[0], *w.shape),
        configs[device_family(x.device)],
        lambda: variants([*_LEAN_CONFIGS.values(), *_CONFIGS.values()], warps=3, stages=4),
        run,
    )
    run(config)
    return act, pre


# ------------------------------------------------------------------------------------------------
# Specs
# ------------------------------------------------------------------------------------------------


def kernel_specs(family: str) -> Iterator[KernelSpec]:
    """Yield the launches of representative calls with the configs of an architecture family.

    Every activation, with and without dropout, bias and the product kept; widths that blocks do
    not divide.
    """
    cases = [
        (torch.bfloat16, 512, "relu", False, False),
        (torch.bfloat16, 512, "gelu", True, True),
        (torch.float16, 1008, "gelu_tanh", True, True),
        (torch.float16, 1024, "silu", False, True),
    ]
    for dtype, width, activation, drops, saves_pre in cases:
        x, w, b = (
            torch.empty(shape, dtype=dtype, device="meta")
            for shape in ((1 << 15, width), (4 * width, width), 4 * width)
        )
        dropout = {
            "seed_ptr": torch.empty((), dtype=torch.int64, device="meta") if drops else None,
            "threshold": 6554 if drops else 0,
            "dropout_scale": 1.25,
        }
        with recorded_launches(family) as specs:
            linear_activation(x, w, b, activation, dropout, saves_pre)
        yield from specs
