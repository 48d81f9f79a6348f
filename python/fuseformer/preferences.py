"""Whether Triton or CUDA C++ goes first where both can serve: rules, by scores of their kernels.

The scores are those of ``python -m bench scores`` and ``python -m bench cuda``; the README has the
table.
"""

from typing import TYPE_CHECKING

from .cuda import decode as cuda_decode
from .cuda import feed_forward as cuda_feed_forward

if TYPE_CHECKING:
    from .backends import Request

# GPUs on which `mma.sync` is the way to the tensor cores; newer data-centre ones have wgmma and
# tcgen05, which Triton uses.
_CUDA_FAMILIES = (8, 12)
# New tokens of a sequence up to which Triton splits the keys: `MOST_QUERIES` of its decode kernel.
_MOST_SPLIT_QUERIES = 64
# Up to this width Triton computes a whole feed-forward block in one kernel.
_MAX_RESIDENT_WIDTH = 256
# Widest input for which a product of our own, whose epilogue saves a pass over its result, is taken
# before the vendor's, which is some 8 % faster: for a plain block, for a gated one that saves its
# products, and for one that saves none and more of that pass.
_MAX_WIDTH, _MAX_GATED_WIDTH, _MAX_GATED_INFERENCE_WIDTH = 1024, 2048, 4096


def why_triton_first(request: "Request") -> str | None:
    """Return why Triton goes before CUDA C++ where both can serve, or None where it does not."""
    if request.capability // 10 not in _CUDA_FAMILIES:
        return "it uses the tensor-core instructions that only these GPUs have"
    if request.op == "decode_attention":
        queries = request.shapes[0][2] if request.shapes else 1
        split = cuda_decode.MOST_QUERIES < queries <= _MOST_SPLIT_QUERIES
        return "its kernel splits the keys of so few new tokens over the GPU" if split else None
    if request.op == "feed_forward":
        return _why_triton_feeds_first(request)
    if request.op == "gated_feed_forward":
        width, out = _widths(request)
        if max(width, out) <= _MAX_RESIDENT_WIDTH:
            return "its kernel keeps hidden activations of narrow blocks out of memory"
        widest = _MAX_GATED_WIDTH if request.trains else _MAX_GATED_INFERENCE_WIDTH
        return _why_the_vendor_first(width, widest)
    return None


def _why_triton_feeds_first(request: "Request") -> str | None:
    """Return the same for plain feed-forward blocks: by the scores of both, see the README."""
    width, out = _widths(request)
    resident = width == out and width in cuda_feed_forward.RESIDENT_WIDTHS
    if resident and request.trains:
        return None
    if request.activation in (None, "relu"):
        return "its kernels score better with ReLU"
    if max(width, out) > _MAX_RESIDENT_WIDTH:
        return _why_the_vendor_first(width, _MAX_WIDTH)
    if not resident:
        return "it has one kernel for both products of every width up to 256"
    if request.activation == "silu" and width == 128:
        return "its kernel scores better with SiLU at this width"
    return None


def _why_the_vendor_first(width: int, widest: int) -> str | None:
    """Return why the vendor's products, which Triton's kernels go between, are taken, or None."""
    if width <= widest:
        return None
    return (
        f"at more than {widest} columns the vendor's products outweigh the pass that CUDA C++ saves"
    )


def _widths(request: "Request") -> tuple[int, int]:
    """Return the widths of the input and the output of a feed-forward block."""
    return (request.shapes[0][-1], request.shapes[2][0]) if len(request.shapes) > 2 else (0, 0)
