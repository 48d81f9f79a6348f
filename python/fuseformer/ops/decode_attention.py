"""Attention of new queries over a cache of keys and values: the public function, its op."""

import importlib
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backends import choose_backend, record, request_for, requested_backend
from . import checks
from .attention import check_extras, default_scale, lse_dtype, unusual_scale, used_options
from .registration import (
    autocast_dtype,
    in_order,
    laid_out,
    lengths_within,
    register_autocast,
)


@torch.library.custom_op("fuseformer::decode_attention", mutates_args=())
def _decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_lengths: Tensor,
    block_table: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    causal: bool,
    window_left: int,
    window_right: int,
    softcap: float,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    options = unusual_scale(scale) | used_options(
        block_table=block_table,
        window=(window_left, window_right),
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
    )
    record(
        request_for("decode_attention", q, k_cache, options=options, head_dim=q.shape[-1]), backend
    )
    module = {
        "cuda": "fuseformer.cuda.decode",
        "triton": "fuseformer.kernels.decode",
        "cpu": "fuseformer.cpu.decode_attention",
    }
    capacity = k_cache.shape[2] * (1 if block_table is None else block_table.shape[1])
    cache_lengths = lengths_within(cache_lengths, capacity)
    block_table, alibi_slopes, sinks = map(in_order, (block_table, alibi_slopes, sinks))
    out, lse = importlib.import_module(module[backend]).decode_attention(
        q,
        k_cache,
        v_cache,
        cache_lengths,
        block_table,
        alibi_slopes,
        sinks,
        window_left,
        0 if causal else window_right,
        softcap,
        scale,
    )
    return laid_out(out, q), lse


@_decode_attention.register_fake
def _(q: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=lse_dtype(q))


register_autocast(_decode_attention, ("q", "k_cache", "v_cache"))


def _check_caches(q: Tensor, k_cache: Any, v_cache: Any, paged: bool) -> None:
    """Require caches that fit `q`, their first dimension being pages or sequences."""
    checks.tensor("k_cache", k_cache, 4, like=q)
    checks.tensor("v_cache", v_cache, 4, like=q)
    if k_cache.shape != v_cache.shape:
        raise ValueError(
            f"v_cache: got shape {tuple(v_cache.shape)}, expected that of k_cache, "
            f"{tuple(k_cache.shape)}"
        )
    if not paged and k_cache.shape[0] != q.shape[0]:
        raise ValueError(
            f"k_cache: got batch size {k_cache.shape[0]}, expected {q.shape[0]} as in q (pages "
            "need a block_table)"
        )
    if k_cache.shape[3] != q.shape[3]:
        raise ValueError(f"k_cache: got head dim {k_cache.shape[3]}, expected {q.shape[3]} as in q")
    if k_cache.shape[1] == 0 or q.shape[1] % k_cache.shape[1]:
        raise ValueError(
            f"k_cache: got {k_cache.shape[1]} heads, expected a divisor of q's {q.shape[1]} heads"
        )
    if paged and k_cache.shape[2] == 0:
        raise ValueError("k_cache: got a page size of 0, expected at least 1")
    for name, x in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        if x.shape[-1] > 1 and x.stride(-1) != 1:
            raise ValueError(f"{name}: got stride {x.stride(-1)} in the last dimension, expected 1")


def _refuse_gradients(**inputs: Tensor | None) -> None:
    if not torch.is_grad_enabled():
        return
    for name, x in inputs.items():
        if x is not None and x.requires_grad:
            raise ValueError(
                f"{name}: requires a gradient, which decode_attention does not give; call it "
                "under torch.no_grad(), or train with attention"
            )


def _validate(
    cache_lengths: Tensor, capacity: int, block_table: Tensor | None, pages: int, page_size: int
) -> None:
    """Raise `ValueError` for lengths beyond the cache and for pages in use that do not exist."""
    wrong = ((cache_lengths < 0) | (cache_lengths > capacity)).nonzero()
    if len(wrong):
        sequence = int(wrong[0])
        raise ValueError(
            f"cache_lengths: got {int(cache_lengths[sequence])} for sequence {sequence}, expected "
            f"0 to {capacity}, what the cache holds of a sequence"
        )
    if block_table is None:
        return
    first_keys = torch.arange(block_table.shape[1], device=block_table.device) * page_size
    used = first_keys < cache_lengths[:, None]
    wrong = (used & ((block_table < 0) | (block_table >= pages))).nonzero()
    if len(wrong):
        sequence, entry = wrong[0].tolist()
        raise ValueError(
            f"block_table: got page {int(block_table[sequence, entry])} for sequence {sequence}, "
            f"entry {entry}, expected 0 to {pages - 1}"
        )


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_lengths: Tensor,
    *,
    block_table: Tensor | None = None,
    causal: bool = True,
    window: tuple[int, int] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    validate: bool = False,
    backend: str | None = None,
) -> Any:
    """Return attention of the new tokens of sequences over their cached keys and values.

    One new token of each is decoding, many are a prompt or the next chunk of one.

    Shapes: `q` (B, H, Sq, D); `k_cache` and `v_cache` (B, Hkv, capacity, D), or with `block_table`
    (B, max_pages) int32, which lists the pages of each sequence in order, (pages, Hkv, page_size,
    D); Hkv a divisor of H, any strides whose last one is 1. `cache_lengths` (B,) int32 counts the
    valid keys of each sequence, those of the new tokens included, which the cache holds already.
    The last query is aligned with the last valid key, query i with key length - Sq + i, and sees no
    later one; with `causal=False` it sees all valid keys. `window` (left, right) counts from there,
    and so does ALiBi's distance. `softcap`, `alibi_slopes` (H,), `sinks` (H,) and `scale` are as in
    `attention`.

    Returns the output (B, H, Sq, D), and with `return_lse` also the natural log-sum-exp (B, H, Sq)
    in float32. A row that sees no key has output 0 and lse -inf, or its sink. What the cache holds
    past a length is never looked at.

    For inference only: an input that requires a gradient while gradients are enabled raises
    `ValueError`. So do, or `TypeError`, other arguments that do not fit; the error names them.
    `validate` also reads lengths and pages on the device, which waits for it and cannot be
    compiled; without it a length beyond the cache counts as the whole cache, and a page that does
    not exist as the nearest one that does.

    Source: Dao et al., "Flash-Decoding for long-context inference", 2023; Kwon et al., "Efficient
    Memory Management for Large Language Model Serving with PagedAttention", 2023.
    """
    checks.tensor("q", q, 4)
    _check_caches(q, k_cache, v_cache, block_table is not None)
    checks.integers("cache_lengths", cache_lengths, (torch.int32, torch.int64), q)
    checks.shape("cache_lengths", cache_lengths, (q.shape[0],), "(batch,)")
    capacity = k_cache.shape[2]
    if block_table is not None:
        checks.integers("block_table", block_table, (torch.int32,), q)
        if block_table.ndim != 2 or block_table.shape[0] != q.shape[0]:
            raise ValueError(
                f"block_table: got shape {tuple(block_table.shape)}, expected (batch, pages of a "
                f"sequence) with batch {q.shape[0]}"
            )
        capacity *= block_table.shape[1] if k_cache.shape[0] else 0
    check_extras(q, q.shape[1], alibi_slopes, sinks)
    _refuse_gradients(q=q, k_cache=k_cache, v_cache=v_cache, alibi_slopes=alibi_slopes, sinks=sinks)
    if validate:
        _validate(cache_lengths, capacity, block_table, k_cache.shape[0], k_cache.shape[2])
    checks.boolean("causal", causal)
    sides = checks.window(window)
    cap = checks.softcap(softcap)
    unusual = frozenset() if scale is None else unusual_scale(checks.scale(scale))
    scale = default_scale(q) if scale is None else scale
    dtype = autocast_dtype(q)
    request = request_for(
        "decode_attention",
        q,
        k_cache,
        options=unusual
        | used_options(
            block_table=block_table,
            window=sides,
            softcap=cap,
            alibi_slopes=alibi_slopes,
            sinks=sinks,
        ),
        head_dim=q.shape[-1],
        requested=requested_backend(backend),
        dtype=dtype,
    )
    name, _ = choose_backend(request)
    if name == "reference":
        record(request, name)
        out, lse = reference.decode_attention(
            q.to(dtype),
            k_cache.to(dtype),
            v_cache.to(dtype),
            cache_lengths,
            block_table=block_table,
            causal=causal,
            window=sides,
            softcap=cap,
            alibi_slopes=alibi_slopes,
            sinks=sinks,
            scale=scale,
        )
    else:
        out, lse = _decode_attention(
            q,
            k_cache,
            v_cache,
            cache_lengths,
            block_table,
            alibi_slopes,
            sinks,
            causal,
            *sides,
            cap,
            scale,
            name,
        )
    return (out, lse) if return_lse else out
