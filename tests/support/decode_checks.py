"""What a decode kernel module must satisfy; each check raises `AssertionError` where it fails.

`kernels` is `fuseformer.kernels.decode`, or a copy of it with a planted bug.
"""

import math
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fuseformer import reference
from fuseformer.testing import assert_close_to_reference

LENGTHS = (0, 1, 63, 113, 257)


@dataclass(frozen=True)
class Case:
    """A call: heads, queries, head dim, dtype, lengths, pages, and what acts on the logits."""

    heads: tuple[int, int]
    queries: int
    head_dim: int
    dtype: torch.dtype
    lengths: tuple[int, ...] = LENGTHS
    page_size: int = 0
    capacity: int = 272
    window_left: int = -1
    softcap: float = 0.0
    alibi: bool = False
    sinks: bool = False
    scale: float = 0.0
    broken_pages: bool = False  # the first of each sequence does not exist
    window_right: int = 0  # causal; -1 is unbounded

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        options = [
            f"pages_{self.page_size}" * bool(self.page_size),
            f"window_{self.window_left}" * (self.window_left >= 0),
            f"right_{self.window_right}" * (self.window_right != 0),
            f"softcap_{self.softcap}" * bool(self.softcap),
            "alibi" * self.alibi,
            "sinks" * self.sinks,
            f"scale_{self.scale}" * bool(self.scale),
            "broken_pages" * self.broken_pages,
        ]
        name = f"{dtype}-{self.heads[0]}:{self.heads[1]}x{self.queries}x{self.head_dim}"
        lengths = ":".join(map(str, self.lengths))
        return "-".join([name, lengths, *filter(None, options)])


def paged(cache: Tensor, lengths: Tensor, page_size: int, order: Tensor) -> tuple[Tensor, Tensor]:
    """Return `cache` (B, Hkv, capacity, D) cut into pages that lie in `order`, and their table.

    Pages that hold nothing, and one that is nobody's, are NaN; their entries are out of range.
    """
    batch, kv_heads, capacity, dim = cache.shape
    count = capacity // page_size
    split = cache.reshape(batch, kv_heads, count, page_size, dim).transpose(1, 2)
    pages = cache.new_full((batch * count + 1, kv_heads, page_size, dim), math.nan)
    pages[order] = split.flatten(0, 1)
    table = order.view(batch, count).int()
    unused = torch.arange(count) * page_size >= lengths[:, None]
    return pages, table.masked_fill(unused, 2**30)


def arguments(case: Case) -> dict[str, Any]:
    """Return the arguments of a call, what the cache holds past a length being NaN."""
    generator = torch.Generator().manual_seed(0)
    heads, kv_heads = case.heads
    batch = len(case.lengths)
    lengths = torch.tensor(case.lengths, dtype=torch.int32)
    q = torch.randn(batch, case.queries, heads, case.head_dim, generator=generator).transpose(1, 2)
    k, v = (
        torch.randn(batch, case.capacity, kv_heads, case.head_dim, generator=generator)
        .transpose(1, 2)
        .masked_fill((torch.arange(case.capacity) >= lengths[:, None])[:, None, :, None], math.nan)
        for _ in range(2)
    )
    table = None
    if case.page_size:
        order = torch.randperm(batch * (case.capacity // case.page_size), generator=generator)
        k, _ = paged(k, lengths, case.page_size, order)
        v, table = paged(v, lengths, case.page_size, order)
        if case.broken_pages:
            table[:, 0] = torch.tensor([len(k), -1]).repeat(batch)[:batch]
            k, v = k.nan_to_num(0.5), v.nan_to_num(0.5)
        k = k.transpose(1, 2).contiguous().transpose(1, 2)  # the caches may differ in strides
    return {
        "q": q.to(case.dtype),
        "k_cache": k.to(case.dtype),
        "v_cache": v.to(case.dtype),
        "cache_lengths": lengths,
        "block_table": table,
        "alibi_slopes": torch.rand(heads, generator=generator) if case.alibi else None,
        "sinks": torch.randn(heads, generator=generator) + 1 if case.sinks else None,
        "window_left": case.window_left,
        "window_right": case.window_right,
        "softcap": case.softcap,
        "scale": case.scale or case.head_dim**-0.5,
    }


def expected_results(call: dict[str, Any], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the output and lse of a call by the oracle in `dtype`."""
    call = dict(call)
    window = (call.pop("window_left"), call.pop("window_right"))
    inputs = {name: call.pop(name).to(dtype) for name in ("q", "k_cache", "v_cache")}
    return reference.decode_attention(**inputs, **call, causal=False, window=window)


def check_decode(kernels: ModuleType, case: Case) -> None:
    """Output and lse against the oracle, and the same to the last bit when repeated."""
    call = arguments(case)
    out, lse = kernels.decode_attention(**call)
    expected = [expected_results(call, dtype) for dtype in (torch.float64, case.dtype)]
    for name, actual, *judges in zip(("out", "lse"), (out, lse), *expected, strict=True):
        assert_close_to_reference(actual, *judges, name=name)
    blind = expected[0][1] == -math.inf
    assert not out[blind].any()
    again = kernels.decode_attention(**call)
    assert torch.equal(out, again[0])
    assert torch.equal(lse, again[1])
