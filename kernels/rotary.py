"""Rotary position embedding in Triton: q and k in one launch, into new tensors or in place.

A rotation has no state to save: backward is the same kernel, turning the other way.

Source: Su et al., "RoFormer", 2021, section 3.2, in the half-split layout of GPT-NeoX and Llama, or
in interleaved pairs, as in the paper and GPT-J.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_tiles import aligned, head_base
from .common import KernelSpec, launch, recorded_launches

# ------------------------------------------------------------------------------------------------
# Configs
# ------------------------------------------------------------------------------------------------

# Pairs of a tile: 8 to each thread of 4 warps, which are two 16-byte accesses in half precision.
# Where a small part of a head turns, the rest decides, that it may stay in registers.
_PAIRS = 1024
_REST = 4096
_WARPS = 4

# Heads that a program takes in turn: they share the tables, which are as wide as a head in float32.
_HEADS = 4

#: Integers that change from call to call. Strides too: ALIGN says what the compiler must know.
_RUNTIME_SIZES = tuple(
    f"stride_{name}{dim}" for name in ("q", "k", "qo", "ko") for dim in "bhs"
) + ("heads_q", "heads_k", "seqlen")  # fmt: skip


def block_config(half: int, rest: int) -> tuple[int, int, int]:
    """Return (BLOCK_S, BLOCK_R, BLOCK_REST) for rows of `half` pairs and `rest` other values."""
    block_r = max(8, triton.next_power_of_2(half))
    block_rest = triton.next_power_of_2(max(1, rest))
    return min(_PAIRS // block_r, _REST // block_rest), block_r, block_rest


# ------------------------------------------------------------------------------------------------
# Device helpers
# ------------------------------------------------------------------------------------------------


@triton.jit
def _rotate_heads(
    ptr, stride_b, stride_h, stride_s, out_ptr, stride_ob, stride_oh, stride_os,
    batch, group, heads, start, seqlen, cos, sin,
    HEAD_DIM: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, IN_PLACE: tl.constexpr,
    HEADS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_REST: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """Rotate the positions from `start` on in one group of the heads of q or of k."""
    stride_s, stride_os = aligned(stride_s, ALIGN), aligned(stride_os, ALIGN)
    rows = tl.arange(0, BLOCK_S)[:, None]  # (BLOCK_S, 1)
    real = rows < seqlen - start
    pair = tl.arange(0, BLOCK_R)[None, :]  # (1, BLOCK_R)
    both = tl.arange(0, 2 * BLOCK_R)[None, :]  # (1, 2 * BLOCK_R)
    rest = 2 * HALF + tl.arange(0, BLOCK_REST)[None, :]  # (1, BLOCK_REST)
    for index in range(group * HEADS, tl.minimum(group * HEADS + HEADS, heads)):
        head = tl.cast(index, tl.int32)
        x = head_base(ptr, batch, head, start, stride_b, stride_h, stride_s, ALIGN)
        out = head_base(out_ptr, batch, head, start, stride_ob, stride_oh, stride_os, ALIGN)
        x, out = x + rows * stride_s, out + rows * stride_os  # (BLOCK_S, 1)
        if INTERLEAVED:
            inside = real & (both < 2 * HALF)
            pairs = tl.load(x + both, mask=inside, other=0.0).to(tl.float32)
            first, second = tl.split(tl.reshape(pairs, (BLOCK_S, BLOCK_R, 2)))
            turned = tl.join(first * cos - second * sin, second * cos + first * sin)
            turned = tl.reshape(turned, (BLOCK_S, 2 * BLOCK_R))
            tl.store(out + both, turned.to(out_ptr.dtype.element_ty), mask=inside)
        else:
            inside = real & (pair < HALF)
            first = tl.load(x + pair, mask=inside, other=0.0).to(tl.float32)  # (BLOCK_S, BLOCK_R)
            second = tl.load(x + HALF + pair, mask=inside, other=0.0).to(tl.float32)
            turned = first * cos - second * sin  # (BLOCK_S, BLOCK_R)
            tl.store(out + pair, turned.to(out_ptr.dtype.element_ty), mask=inside)
            turned = second * cos + first * sin  # (BLOCK_S, BLOCK_R)
            tl.store(out + HALF + pair, turned.to(out_ptr.dtype.element_ty), mask=inside)
        if not IN_PLACE and HEAD_DIM > 2 * HALF:
            inside = real & (rest < HEAD_DIM)
            tl.store(out + rest, tl.load(x + rest, mask=inside), mask=inside)


# ------------------------------------------------------------------------------------------------
# Kernels
# ------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=_RUNTIME_SIZES)
def rotary_kernel(
    q_ptr, stride_qb, stride_qh, stride_qs, q_out_ptr, stride_qob, stride_qoh, stride_qos,
    k_ptr, stride_kb, stride_kh, stride_ks, k_out_ptr, stride_kob, stride_koh, stride_kos,
    cos_ptr, sin_ptr, heads_q, heads_k, seqlen, direction,
    HEAD_DIM: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, IN_PLACE: tl.constexpr,
    BATCHED: tl.constexpr, HEADS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_REST: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Rotate a block of positions in HEADS heads of q, or in as many of k.

    Grid: (batch * blocks of positions * groups of heads,), the groups of q and then of k being next
    to each other, for they read the same rows of the tables. q and k are (B, H, S, HEAD_DIM) with
    any strides whose last one is 1, cos and sin (S, HALF), or (B, S, HALF) if BATCHED, contiguous.
    `direction` is 1.0, or -1.0 to rotate back.
    """
    groups_q = tl.cdiv(heads_q, HEADS)
    groups = groups_q + tl.cdiv(heads_k, HEADS)
    group = tl.program_id(0) % groups
    blocks = tl.cdiv(seqlen, BLOCK_S)
    start = tl.program_id(0) // groups % blocks * BLOCK_S
    batch = tl.program_id(0) // groups // blocks
    rows = tl.arange(0, BLOCK_S)[:, None]  # (BLOCK_S, 1)
    pair = tl.arange(0, BLOCK_R)[None, :]  # (1, BLOCK_R)
    inside = (rows < seqlen - start) & (pair < HALF)
    table = start.to(tl.int64) * HALF
    if BATCHED:
        table += batch.to(tl.int64) * seqlen * HALF
    entries = rows * HALF + pair  # (BLOCK_S, BLOCK_R)
    cos = tl.load(cos_ptr + table + entries, mask=inside, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + table + entries, mask=inside, other=0.0).to(tl.float32) * direction
    if group < groups_q:
        _rotate_heads(
            q_ptr, stride_qb, stride_qh, stride_qs, q_out_ptr, stride_qob, stride_qoh, stride_qos,
            batch, group, heads_q, start, seqlen, cos, sin,
            HEAD_DIM, HALF, INTERLEAVED, IN_PLACE, HEADS, BLOCK_S, BLOCK_R, BLOCK_REST, ALIGN,
        )  # fmt: skip
    else:
        _rotate_heads(
            k_ptr, stride_kb, stride_kh, stride_ks, k_out_ptr, stride_kob, stride_koh, stride_kos,
            batch, group - groups_q, heads_k, start, seqlen, cos, sin,
            HEAD_DIM, HALF, INTERLEAVED, IN_PLACE, HEADS, BLOCK_S, BLOCK_R, BLOCK_REST, ALIGN,
        )  # fmt: skip


# ------------------------------------------------------------------------------------------------
# Launchers
# ------------------------------------------------------------------------------------------------


def _strides(**tensors: Tensor) -> dict[str, int]:
    """Return stride_{name}b, _{name}h and _{name}s of each tensor, and ALIGN."""
    found: dict[str, int] = {}
    for name, tensor in tensors.items():
        # A dimension of size 1 may have any stride, a misaligned one too.
        steps = zip("bhs", tensor.stride(), tensor.shape, strict=False)
        found |= {f"stride_{name}{dim}": step if size > 1 else 0 for dim, step, size in steps}
    # The head dim has a say, so that a single row or head does not ask for a kernel of its own.
    steps_and_dims = [*found.values(), *(tensor.shape[-1] for tensor in tensors.values())]
    return found | {"ALIGN": 8 if all(n % 8 == 0 for n in steps_and_dims) else 1}


def rotate(
    q: Tensor,
    k: Tensor,
    q_out: Tensor,
    k_out: Tensor,
    cos: Tensor,
    sin: Tensor,
    inverse: bool,
    interleaved: bool,
) -> None:
    """Write `q` (B, H, S, D) and `k` (B, Hkv, S, D), rotated, to tensors of their shape.

    Those have a last stride of 1, and may be `q` and `k` themselves. `cos` and `sin` are (S, R/2)
    or (B, S, R/2); `inverse` rotates back, `interleaved` turns dimension 2i against 2i + 1.
    """
    in_place = q_out is q
    if not in_place:
        q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    batch, heads_q, seqlen, head_dim = q.shape
    heads_k, half = k.shape[1], cos.shape[-1]
    if in_place and half == 0:
        return
    block_s, block_r, block_rest = block_config(half, 0 if in_place else head_dim - 2 * half)
    arguments = {
        "q_ptr": q,
        "q_out_ptr": q_out,
        "k_ptr": k,
        "k_out_ptr": k_out,
        "cos_ptr": cos.contiguous(),
        "sin_ptr": sin.contiguous(),
        **_strides(q=q, qo=q_out, k=k, ko=k_out),
        "heads_q": heads_q,
        "heads_k": heads_k,
        "seqlen": seqlen,
        "direction": -1.0 if inverse else 1.0,
        "HEAD_DIM": head_dim,
        "HALF": half,
        "INTERLEAVED": interleaved,
        "IN_PLACE": in_place,
        "BATCHED": cos.dim() == 3,
        "HEADS": _HEADS,
        "BLOCK_S": block_s,
        "BLOCK_R": block_r,
        "BLOCK_REST": block_rest,
    }
    groups = triton.cdiv(heads_q, _HEADS) + triton.cdiv(heads_k, _HEADS)
    programs = batch * triton.cdiv(seqlen, block_s) * groups
    launch(rotary_kernel, (programs,), arguments, num_warps=_WARPS, num_stages=1)


# ------------------------------------------------------------------------------------------------
# Specs
# ------------------------------------------------------------------------------------------------


def kernel_specs(family: str) -> Iterator[KernelSpec]:
    """Yield the launches of representative calls; the configs are the same for every `family`."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    for dtype, head_dim, half, interleaved, in_place in (
        (bf16, 128, 64, False, False),
        (bf16, 128, 64, True, True),
        (fp16, 80, 16, False, False),
        (bf16, 96, 36, True, False),
        (fp32, 256, 32, True, False),
        (fp32, 64, 32, False, True),
        (bf16, 256, 128, False, True),
        (fp16, 256, 128, True, False),
    ):
        q, k = (torch.empty(2, h, 512, head_dim, dtype=dtype, device="meta") for h in (8, 2))
        cos = torch.empty(512, half, dtype=torch.float32, device="meta")
        outs = (q, k) if in_place else (torch.empty_like(q), torch.empty_like(k))
        with recorded_launches(family) as specs:
            rotate(q, k, *outs, cos, cos, False, interleaved)
        yield from specs
