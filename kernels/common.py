"""What kernel families share: the dropout mask of a tile, launching, and specs for compiling."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# ------------------------------------------------------------------------------------------------
# Constants
# ------------------------------------------------------------------------------------------------

#: Compute capability -> family that shares configs. sm_86, sm_89 and sm_120 have about 100 KB of
#: shared memory and warp-level mma; sm_90 has wgmma, sm_100 tcgen05, both with about 228 KB. 942
#: stands for AMD's gfx942, with 64 KB and 64 threads a warp.
FAMILIES = {
    80: "sm_80",
    86: "sm_86",
    87: "sm_80",
    89: "sm_86",
    90: "sm_90",
    100: "sm_100",
    103: "sm_100",
    120: "sm_86",
    121: "sm_86",
    942: "gfx942",
}

_POINTER_TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
    torch.bool: "*u1",
}

_recorder: "_Recorder | None" = None


# ------------------------------------------------------------------------------------------------
# Device helpers
# ------------------------------------------------------------------------------------------------


@triton.jit
def dropout_keep(
    seed,
    batch,
    head,
    row_start,
    col_start,
    threshold,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Return which elements of a tile dropout keeps, as the definition in `fuseformer.philox`.

    `seed` is the loaded 64-bit seed, `threshold` is ``round(p * 65536)``. The tile begins at
    (`row_start`, `col_start`), multiples of 16 and 32, as are BLOCK_M and BLOCK_N.
    """
    row = row_start // 2 + tl.arange(0, BLOCK_M // 2)  # (BLOCK_M / 2,)
    col = col_start // 4 + tl.arange(0, BLOCK_N // 4)  # (BLOCK_N / 4,)
    # One call per patch of 2 x 4 elements; the joins put the word index, low bit last.
    w0, w1, w2, w3 = tl.philox(
        seed,
        tl.broadcast_to(col[None, :], (BLOCK_M // 2, BLOCK_N // 4)).to(tl.uint32),
        tl.broadcast_to(row[:, None], (BLOCK_M // 2, BLOCK_N // 4)).to(tl.uint32),
        tl.full((BLOCK_M // 2, BLOCK_N // 4), head, tl.uint32),
        tl.full((BLOCK_M // 2, BLOCK_N // 4), batch, tl.uint32),
    )  # (BLOCK_M / 2, BLOCK_N / 4) each
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    words = tl.reshape(words, (BLOCK_M // 16, 8, BLOCK_N // 32, 8, 2, 2))
    keep = tl.join((words & 0xFFFF) >= threshold, (words >> 16) >= threshold)
    # (rows / 16, row % 8, cols / 32, col % 8, word bit 1, word bit 0, half)
    return tl.reshape(tl.permute(keep, (0, 6, 1, 2, 4, 5, 3)), (BLOCK_M, BLOCK_N))


# ------------------------------------------------------------------------------------------------
# Launching
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KernelSpec:
    """One launch as the compiler sees it: what to hand to `triton.compile` for a GPU not at hand.

    `arguments` are those of the launch by name, its tensors standing for their dtype alone;
    `options` are the compiler's.
    """

    kernel: triton.JITFunction
    arguments: dict[str, Any]
    options: dict[str, int]

    def source(self) -> triton.compiler.ASTSource:
        """Return the compiler's input, specialised on the arguments as a real launch would be."""
        signature: dict[str, str] = {}
        constexprs: dict[tuple[int], Any] = {}
        attributes: dict[tuple[int], list[list[Any]]] = {}
        for parameter in self.kernel.params:
            name = parameter.name
            value = self.arguments.get(name, parameter.default)
            one = type(value) is int and value == 1 and not parameter.do_not_specialize
            if parameter.is_constexpr or value is None or one:
                signature[name] = "constexpr"
                constexprs[(parameter.num,)] = value
            elif isinstance(value, Tensor):
                signature[name] = _POINTER_TYPES[value.dtype]
                attributes[(parameter.num,)] = [["tt.divisibility", 16]]
            elif isinstance(value, float):
                signature[name] = "fp32"
            else:
                signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
                if value % 16 == 0 and not parameter.do_not_specialize:
                    attributes[(parameter.num,)] = [["tt.divisibility", 16]]
        return triton.compiler.ASTSource(self.kernel, signature, constexprs, attributes)


@dataclass
class _Recorder:
    """Takes the place of the GPU while `recorded_launches` is open."""

    family: str
    specs: list[KernelSpec]


def launch(
    kernel: triton.JITFunction,
    grid: tuple[int, ...],
    arguments: dict[str, Any],
    *,
    num_warps: int,
    num_stages: int,
) -> None:
    """Launch `kernel` with named arguments on the device of its tensors, on the current stream.

    An empty grid launches nothing. While `recorded_launches` is open the launch is only recorded.
    """
    if 0 in grid:
        return
    options = {"num_warps": num_warps, "num_stages": num_stages}
    if _recorder is not None:
        _recorder.specs.append(KernelSpec(kernel, arguments, options))
        return
    device = next(a.device for a in arguments.values() if isinstance(a, Tensor))
    guard = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with guard:
        kernel[grid](**arguments, **options)


@contextmanager
def recorded_launches(family: str) -> Iterator[list[KernelSpec]]:
    """Collect the launches made inside, with the configs of `family`, instead of running them.

    Call launchers with tensors on the "meta" device: `kernel_specs` of every module does, so that
    each kernel can be compiled for GPUs that are not there.
    """
    global _recorder
    previous, _recorder = _recorder, _Recorder(family, [])
    try:
        yield _recorder.specs
    finally:
        _recorder = previous


def device_family(device: torch.device) -> str:
    """Return the architecture family of `device`, one of the values of `FAMILIES`.

    A newer GPU than the table knows takes the configs of sm_86, which ask for little, and every
    GPU of AMD those of gfx942.
    """
    if _recorder is not None:
        return _recorder.family
    if device.type != "cuda":  # something executes the kernels on the CPU
        return "sm_80"
    if torch.version.hip is not None:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    return FAMILIES.get(10 * major + minor, "sm_86")


def dot_precision(dtype: torch.dtype) -> str:
    """Return the `input_precision` of dots on `dtype`: what PyTorch's own matmuls would use."""
    if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "ieee"
