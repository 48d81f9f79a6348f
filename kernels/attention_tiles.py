"""What the attention kernels share: the layout of a call, tiles of it, and the logits' one home."""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_configs import Demand
from .common import device_family, dot_precision

# ------------------------------------------------------------------------------------------------
# Constants
# ------------------------------------------------------------------------------------------------

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

#: Integers that change from call to call: specialising on them would only add compilations.
RUNTIME_SIZES = ("heads", "seqlen_q", "seqlen_k", "threshold")


# ------------------------------------------------------------------------------------------------
# Device helpers
# ------------------------------------------------------------------------------------------------


@triton.jit
def sequence_bounds(
    batch, cu_seqlens_q, cu_seqlens_k, key_lengths, seqlen_q, seqlen_k, BOTTOM_RIGHT: tl.constexpr
):
    """Return a sequence's first rows in q and k, its query number, its key end, its diagonal.

    Dense tensors start at row 0 of their batch entry. Keys at or past the end do not exist or are
    padding; with a causal mask query i sees the keys up to i + diagonal.
    """
    start_q = tl.full((), 0, tl.int32)
    start_k = tl.full((), 0, tl.int32)
    if cu_seqlens_q is not None:
        start_q = tl.load(cu_seqlens_q + batch)
        start_k = tl.load(cu_seqlens_k + batch)
        seqlen_q = tl.load(cu_seqlens_q + batch + 1) - start_q
        seqlen_k = tl.load(cu_seqlens_k + batch + 1) - start_k
    diagonal = tl.full((), 0, tl.int32)
    if BOTTOM_RIGHT:
        diagonal = seqlen_k - seqlen_q
    key_end = seqlen_k
    if key_lengths is not None:
        key_end = tl.maximum(tl.minimum(tl.load(key_lengths + batch), seqlen_k), 0)
    return start_q, start_k, seqlen_q, seqlen_k, key_end, diagonal


@triton.jit
def aligned(stride, ALIGN: tl.constexpr):
    """Return `stride`, which ALIGN divides, in a form from which the compiler can tell that.

    By itself it only sees divisibility by 16, and head dims such as 40 or 72 would lose their
    16-byte loads.
    """
    return stride // ALIGN * ALIGN


@triton.jit
def head_base(ptr, batch, head, start, stride_b, stride_h, stride_s, ALIGN: tl.constexpr):
    """Return the pointer to row `start` of one head, by 64-bit offsets: tensors may be large."""
    offset = batch.to(tl.int64) * aligned(stride_b, ALIGN)
    offset += head.to(tl.int64) * aligned(stride_h, ALIGN)
    return ptr + (offset + start.to(tl.int64) * stride_s)


@triton.jit
def tile_offsets(stride_s, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return the offsets of a tile's elements from its first row, 32-bit and the same for all."""
    return tl.arange(0, BLOCK)[:, None] * stride_s + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def load_tile(base, offsets, row, stride_s, rows, HEAD_DIM: tl.constexpr, BOUNDED: tl.constexpr):
    """Load the tile that begins at `row`: 0 from row `rows` on, if BOUNDED, and past HEAD_DIM."""
    BLOCK: tl.constexpr = offsets.shape[0]
    BLOCK_D: tl.constexpr = offsets.shape[1]
    ptrs = base + tl.cast(row, tl.int64) * stride_s + offsets  # (BLOCK, BLOCK_D)
    real_row = tl.arange(0, BLOCK)[:, None] < rows - row  # (BLOCK, 1)
    real_column = tl.arange(0, BLOCK_D)[None, :] < HEAD_DIM  # (1, BLOCK_D)
    if BOUNDED and HEAD_DIM != BLOCK_D:
        tile = tl.load(ptrs, mask=real_row & real_column, other=0.0)
    elif BOUNDED:
        tile = tl.load(ptrs, mask=real_row, other=0.0)
    elif HEAD_DIM != BLOCK_D:
        tile = tl.load(ptrs, mask=real_column, other=0.0)
    else:
        tile = tl.load(ptrs)
    return tile  # (BLOCK, BLOCK_D)


@triton.jit
def store_tile(base, tile, row, stride_s, rows, HEAD_DIM: tl.constexpr):
    """Store `tile` (BLOCK, BLOCK_D) from `row` up to row `rows` and column HEAD_DIM."""
    BLOCK: tl.constexpr = tile.shape[0]
    BLOCK_D: tl.constexpr = tile.shape[1]
    ptrs = base + tl.cast(row, tl.int64) * stride_s + tile_offsets(stride_s, BLOCK, BLOCK_D)
    real_row = tl.arange(0, BLOCK)[:, None] < rows - row  # (BLOCK, 1)
    real_column = tl.arange(0, BLOCK_D)[None, :] < HEAD_DIM  # (1, BLOCK_D)
    tl.store(ptrs, tile.to(base.dtype.element_ty), mask=real_row & real_column)


@triton.jit
def key_ranges(
    row, seqlen_q, key_end, diagonal, padding, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Return where the unmasked key blocks of a query block end, and where its visible keys end.

    Blocks before the first hide nothing; between the two some element is masked; those past the
    second are never visited. A padding mask may touch any block: none counts as unmasked then.
    """
    full_end = key_end
    visible_end = key_end
    if CAUSAL:
        last_row = tl.minimum(row + BLOCK_M, seqlen_q) - 1
        visible_end = tl.minimum(key_end, last_row + diagonal + 1)
        full_end = tl.maximum(tl.minimum(key_end, row + diagonal + 1), 0)
    full_end = full_end // BLOCK_N * BLOCK_N
    if padding is not None:
        full_end = full_end * 0
    return full_end, visible_end


@triton.jit
def row_ends(rows, key_end, diagonal, CAUSAL: tl.constexpr):
    """Return, for each query row, the first key that length or causality hides."""
    ends = tl.zeros_like(rows) + key_end
    if CAUSAL:
        ends = tl.minimum(ends, rows + diagonal + 1)
    return ends


@triton.jit
def masked_logits(logits, columns, ends, pad_base, stride_pad_s, seqlen_k, AXIS: tl.constexpr):
    """Return `logits` with -inf where a key is hidden: the one place where masks act.

    Keys lie along AXIS: the forward and dq passes hold logits as (query, key), the dk/dv pass as
    (key, query). `columns` are the keys' positions, `ends` the queries' first hidden keys.
    """
    visible = tl.expand_dims(columns, 1 - AXIS) < tl.expand_dims(ends, AXIS)
    if pad_base is not None:
        padded = tl.load(pad_base + columns * stride_pad_s, mask=columns < seqlen_k, other=1)
        visible = visible & tl.expand_dims(padded == 0, 1 - AXIS)
    return tl.where(visible, logits, -float("inf"))


# ------------------------------------------------------------------------------------------------
# Layout of a call
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """Sizes and tensors that the forward and backward launchers of one call have in common.

    Dense tensors are (B, H, S, D). Packed ones, (T, H, D), are seen as a batch of one, and
    `cu_seqlens_*` say which rows form a sequence; `batch` counts the sequences then.
    """

    batch: int
    heads: int
    group: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    dtype: torch.dtype
    family: str
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None

    @classmethod
    def dense(cls, q: Tensor, k: Tensor) -> "Layout":
        """Return the layout of `q` (B, H, Sq, D) and `k` (B, Hkv, Sk, D)."""
        batch, heads, seqlen_q, head_dim = q.shape
        group = heads // max(k.shape[1], 1)
        family = device_family(q.device)
        return cls(batch, heads, group, seqlen_q, k.shape[2], head_dim, q.dtype, family, None, None)

    @classmethod
    def packed(
        cls, q: Tensor, k: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int
    ) -> "Layout":
        """Return the layout of `q` (Tq, H, D) and `k` (Tk, Hkv, D) with the given boundaries."""
        group = q.shape[1] // max(k.shape[1], 1)
        return cls(
            cu_q.numel() - 1,
            q.shape[1],
            group,
            max_q if q.shape[0] else 0,
            max_k if k.shape[0] else 0,
            q.shape[2],
            q.dtype,
            device_family(q.device),
            cu_q,
            cu_k,
        )

    @property
    def block_d(self) -> int:
        """The head dim that tiles have: a power of two that the tensor cores take."""
        return max(16, triton.next_power_of_2(self.head_dim))

    def demand(self, dropout_p: float) -> Demand:
        """Return which row of the configs a call reads."""
        if dropout_p:
            return "dropout"
        return "lean" if self.group == 1 and self.head_dim == self.block_d else "general"

    def arguments(
        self,
        lse: Tensor,
        *,
        seed: Tensor | None,
        causal: str,
        scale: float,
        dropout_p: float,
        key_lengths: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
    ) -> dict[str, Any]:
        """Return the kernel arguments that do not depend on tiles and on which tensors are read."""
        threshold = round(dropout_p * 65536)
        packed = self.cu_seqlens_q is not None
        return {
            "key_lengths": key_lengths,
            "padding": key_padding_mask,
            "stride_pad_b": 0 if key_padding_mask is None else key_padding_mask.stride(0),
            "stride_pad_s": 0 if key_padding_mask is None else key_padding_mask.stride(1),
            "cu_seqlens_q": self.cu_seqlens_q,
            "cu_seqlens_k": self.cu_seqlens_k,
            "seed_ptr": seed if threshold else None,
            "stride_lb": 0 if packed else lse.stride(0),
            "stride_lh": lse.stride(-2),
            "heads": self.heads,
            "seqlen_q": self.seqlen_q,
            "seqlen_k": self.seqlen_k,
            "sm_scale": scale,
            "threshold": threshold,
            "dropout_scale": 65536 / (65536 - threshold) if threshold < 65536 else 0.0,
            "GROUP": self.group,
            "HEAD_DIM": self.head_dim,
            "BLOCK_D": self.block_d,
            "CAUSAL": causal != "none",
            "BOTTOM_RIGHT": causal == "bottom_right",
            "PRECISION": dot_precision(self.dtype),
        }

    def strides(self, **tensors: Tensor) -> dict[str, int]:
        """Return stride_{name}b, _{name}h and _{name}s of each tensor, and ALIGN."""
        found: dict[str, int] = {}
        for name, tensor in tensors.items():
            # A dimension of size 1 may have any stride, a misaligned one too.
            steps = [
                n if size > 1 else 0 for n, size in zip(tensor.stride(), tensor.shape, strict=True)
            ]
            b, h, s = steps[:3] if self.cu_seqlens_q is None else (0, steps[1], steps[0])
            found |= {f"stride_{name}b": b, f"stride_{name}h": h, f"stride_{name}s": s}
        align = 8 if all(stride % 8 == 0 for stride in found.values()) else 1
        return found | {"ALIGN": align}


def unit_stride(tensor: Tensor) -> Tensor:
    """Return `tensor`, copied if its last dimension is not the contiguous one that kernels need."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def positive_scale(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """Return `q` and `scale` with the sign of the scale moved into q.

    Kernels take maxima before they scale, and an infinity times 0 has no value: a scale of 0
    becomes the smallest normal number, which no softmax can tell from it.
    """
    return (-q, -scale) if scale < 0 else (q, scale or 2.0**-126)


def check_served(
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    window_left: int,
    window_right: int,
    softcap: float,
) -> None:
    """Raise `ValueError` for options these kernels do not take; `choose_backend` avoids them."""
    given = {
        "bias": bias is not None,
        "alibi_slopes": alibi_slopes is not None,
        "sinks": sinks is not None,
        "window": window_left >= 0 or window_right >= 0,
        "softcap": softcap != 0,
    }
    names = [name for name, is_given in given.items() if is_given]
    if names:
        raise ValueError(f"{', '.join(names)}: the Triton attention kernels take no such option")
