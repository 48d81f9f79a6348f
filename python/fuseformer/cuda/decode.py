"""Decoding by the CUDA C++ kernels, with the signature of `fuseformer.kernels.decode`."""

from functools import lru_cache

import torch
from torch import Tensor

from . import library
from .attention import aligned, cached_attention_forward, require_options, result_like

#: Options of decoding that the kernels have.
OPTIONS = frozenset({"window", "block_table"})
#: New tokens of a sequence that the decode kernel takes: those of one head fill a tile. The forward
#: kernel of attention takes more, which knows no pages.
MOST_QUERIES = 16

# Of `DecodeTraits`: rows of a block, and keys of a step. Splits of fewer steps cost more to join
# than they save.
_ROWS, _STEP, _LEAST_STEPS = 16, 64, 4


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """Return how many there are; the emulator is taken for a GPU."""
    if device.type != "cuda":
        return 64
    return torch.cuda.get_device_properties(device).multi_processor_count


def _splits(blocks: int, keys: int, device: torch.device) -> int:
    """Return over how many blocks to split `keys`: two for each multiprocessor, if they suffice."""
    wanted = -(-2 * multiprocessors(device) // max(blocks, 1))
    return max(1, min(wanted, keys // (_STEP * _LEAST_STEPS)))


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_lengths: Tensor,
    block_table: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    window_left: int,
    window_right: int,
    softcap: float,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return the output, like `q` (B, H, Sq, D), and lse (B, H, Sq) in float32."""
    require_options(None, None, alibi_slopes, sinks, softcap)
    if block_table is not None and q.shape[2] > MOST_QUERIES:
        raise ValueError(
            f"q: got {q.shape[2]} new tokens, expected at most {MOST_QUERIES} over pages"
        )
    batch, heads, queries, head_dim = q.shape
    kv_heads, capacity = k_cache.shape[1:3]
    if block_table is not None:
        capacity *= block_table.shape[1]
        block_table = block_table.contiguous()
    if cache_lengths.dtype != torch.int32:
        cache_lengths = cache_lengths.clamp(0, capacity).int()
    if queries > MOST_QUERIES:
        return cached_attention_forward(
            q, k_cache, v_cache, cache_lengths.contiguous(), window_left, window_right, scale
        )
    out = result_like(q, zeros=False)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    row_blocks = -(-(heads // kv_heads) * queries // _ROWS)
    keys = capacity if window_left < 0 else min(capacity, window_left + queries)
    splits = _splits(row_blocks * kv_heads * batch, keys, q.device)
    partial_out = partial_lse = None
    if splits > 1:
        partial_lse = q.new_empty((*lse.shape, splits), dtype=torch.float32)
        partial_out = q.new_empty((*lse.shape, splits, head_dim), dtype=torch.float32)
    library.ops().attention_decode(
        aligned(q),
        aligned(k_cache),
        aligned(v_cache),
        out,
        lse,
        cache_lengths.contiguous(),
        block_table,
        partial_out,
        partial_lse,
        splits,
        window_left,
        window_right,
        scale,
    )
    return out, lse
