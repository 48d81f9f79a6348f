"""What a call of attention hands to its kernels: sizes, strides and options."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from .attention_configs import Demand, Pass, Tiles, attention_tiles, candidates, paged_tiles
from .autotune import tuned
from .common import device_family, dot_precision, launch

# A window wider than any sequence hides nothing; sums of such numbers stay within 32 bits.
_WIDEST = 1 << 29
# Offsets within a tile have 32 bits: sums of two such steps for each of 256 rows fit.
_FARTHEST = 1 << 22


@dataclass(frozen=True)
class Options:
    """The options of a call as the ops hand them over, but for the scale: here it is positive.

    `bias` broadcasts to (B, H, Sq, Sk); `window_left`, `window_right` are -1 where unbounded, a
    `softcap` of 0 is off.
    """

    seed: Tensor | None
    causal: str
    window_left: int
    window_right: int
    softcap: float
    scale: float
    dropout_p: float
    bias: Tensor | None = None
    key_padding_mask: Tensor | None = None
    key_lengths: Tensor | None = None
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None

    @property
    def act_on_logits(self) -> bool:
        """Whether more than the scale and masks makes the logits."""
        return self.bias is not None or self.alibi_slopes is not None or self.softcap != 0


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

    def demand(self, options: Options) -> Demand:
        """Return which row of the configs a call reads."""
        if options.act_on_logits:
            return "everything" if options.dropout_p else "logits"
        if options.dropout_p:
            return "dropout"
        if options.window_left >= 0:
            return "windowed"
        return "lean" if self.group == 1 and self.head_dim == self.block_d else "general"

    def tuned_tiles(
        self,
        which: Pass,
        kernel: triton.JITFunction,
        options: Options,
        arguments: dict[str, Any],
        run: Callable[[Tiles], object],
    ) -> Tiles:
        """Return the config of a pass for this call; `arguments` are the launch's but for it."""
        demand = self.demand(options)
        tiles = attention_tiles(which, self.family, self.block_d, self.dtype, demand)
        if "table_ptr" in arguments:
            tiles = paged_tiles(tiles)
        return tuned(
            kernel,
            arguments,
            (self.batch * self.heads, self.seqlen_q, self.seqlen_k),
            tiles,
            lambda: candidates(which, self.block_d, self.dtype),
            run,
        )

    def launch_pass(
        self,
        which: Pass,
        kernel: triton.JITFunction,
        options: Options,
        arguments: dict[str, Any],
        *,
        keys: bool = False,
    ) -> None:
        """Launch a pass whose programs take a block of a head's queries each, or of its `keys`."""
        length, heads = self.seqlen_q, self.heads
        if keys:
            length, heads = self.seqlen_k, self.heads // max(self.group, 1)

        def run(tiles: Tiles) -> None:
            blocks = triton.cdiv(length, tiles.block_n if keys else tiles.block_m)
            sides = {"BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n}
            launch(
                kernel,
                (blocks * heads * self.batch,),
                {**arguments, **sides, "EDGE_M" if keys else "EDGE_N": tiles.edge},
                num_warps=tiles.warps,
                num_stages=tiles.stages,
            )

        run(self.tuned_tiles(which, kernel, options, arguments, run))

    def arguments(self, lse: Tensor, options: Options) -> dict[str, Any]:
        """Return the kernel arguments that do not depend on tiles and on which tensors are read."""
        threshold = round(options.dropout_p * 65536)
        lengths = options.key_lengths
        right = 0 if options.causal != "none" else options.window_right
        return {
            **self.scoring_arguments(options),
            "key_lengths": None if lengths is None else lengths.to(torch.int32),
            "cu_seqlens_q": self.cu_seqlens_q,
            "cu_seqlens_k": self.cu_seqlens_k,
            "seed_ptr": options.seed if threshold else None,
            "stride_lb": lse.stride(0) if self.cu_seqlens_q is None else 0,
            "stride_lh": lse.stride(-2),
            "heads": self.heads,
            "seqlen_q": self.seqlen_q,
            "seqlen_k": self.seqlen_k,
            "window_left": None if options.window_left < 0 else min(options.window_left, _WIDEST),
            "window_right": None if right < 0 else min(right, _WIDEST),
            "sm_scale": options.scale,
            "threshold": threshold,
            "dropout_scale": 65536 / (65536 - threshold) if threshold < 65536 else 0.0,
            "GROUP": self.group,
            "HEAD_DIM": self.head_dim,
            "BLOCK_D": self.block_d,
            "BOTTOM_RIGHT": options.causal == "bottom_right",
            "PRECISION": dot_precision(self.dtype),
        }

    def scoring_arguments(self, options: Options) -> dict[str, Any]:
        """Return the arguments of what acts on the logits of a head besides the scale."""
        bias, padding, slopes = options.bias, options.key_padding_mask, options.alibi_slopes
        if padding is not None and padding.stride(1) != 1:
            padding = padding.contiguous()  # offsets of all keys have 32 bits
        names = ("stride_bias_b", "stride_bias_h", "stride_bias_m", "stride_bias_n")
        strides = dict.fromkeys(names, 0)
        if bias is not None:
            bias = bias[(None,) * (4 - bias.dim())]
            if bias.dtype == torch.float64:
                bias = bias.float()
            if is_far(bias, 2, 3):
                once = tuple(slice(None) if step else slice(1) for step in bias.stride())
                bias = bias[once].contiguous()  # of what is broadcast, once
            steps = zip(names, bias.stride(), bias.shape, strict=True)
            strides = {name: stride if size > 1 else 0 for name, stride, size in steps}
        return {
            "bias_ptr": bias,
            **strides,
            "slopes_ptr": None if slopes is None else slopes.float(),
            "softcap": options.softcap or None,
            "padding_ptr": padding,
            "stride_pad_b": 0 if padding is None else padding.stride(0),
            "stride_pad_s": 0 if padding is None else padding.stride(1),
            "BIAS_ALIGN": None if bias is None else _alignment(list(strides.values())[:3]),
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
        return found | {"ALIGN": _alignment(found.values())}


def _alignment(strides: Iterable[int]) -> int:
    """Return what divides all strides: 8, which 16-byte loads of 16-bit elements want, or 1."""
    return 8 if all(stride % 8 == 0 for stride in strides) else 1


def is_far(tensor: Tensor, *dims: int) -> bool:
    """Return whether steps along `dims` take a tile past what 32 bits can count."""
    return any(tensor.stride(dim) > _FARTHEST and tensor.shape[dim] > 1 for dim in dims)


def near(tensor: Tensor, *dims: int) -> Tensor:
    """Return `tensor`, copied if it `is_far` along `dims`."""
    return tensor.contiguous() if is_far(tensor, *dims) else tensor


def laid_out_like(result: Tensor, given: Tensor, used: Tensor) -> Tensor:
    """Return `result`, which is like `used`, as ``empty_like(given)`` lies in memory.

    Callers count on it; `used` is another tensor where `near` has copied `given`.
    """
    return result if used is given else torch.empty_like(given).copy_(result)


def unit_stride(tensor: Tensor) -> Tensor:
    """Return `tensor`, copied if its last dimension is not the contiguous one that kernels need."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def positive_scale(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """Return `q` and `scale` with the sign of the scale moved into q.

    Kernels take maxima before they scale, and an infinity times 0 has no value: a scale of 0
    becomes the smallest normal number, which no softmax can tell from it.
    """
    return (-q, -scale) if scale < 0 else (q, scale or 2.0**-126)
