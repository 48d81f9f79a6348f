"""The calls whose traffic is counted: small, because they are executed on the CPU."""

from collections.abc import Callable

import torch
from fuseformer.kernels import (
    attention,
    cross_entropy,
    decode,
    feed_forward,
    gated_feed_forward,
    norm,
    rotary,
)


def _attention(
    lengths: tuple[int, int],
    dim: int,
    *,
    causal: str = "none",
    window: int = -1,
    key_lengths: tuple[int, ...] = (),
    kv_heads: int = 2,
    bias: bool = False,
) -> None:
    batch = max(1, len(key_lengths))
    q = torch.randn(batch, 2, lengths[0], dim, dtype=torch.bfloat16)
    k = torch.randn(batch, kv_heads, lengths[1], dim, dtype=torch.bfloat16)
    real = torch.tensor(key_lengths, dtype=torch.int32) if key_lengths else None
    added = torch.randn(1, 2, *lengths, dtype=torch.bfloat16) if bias else None
    masks = (added, None, real, None, None)
    options = (None, causal, window, -1, 0.0, dim**-0.5, 0.0)
    out, lse = attention.attention_forward(q, k, k, *masks, *options)
    attention.attention_backward(out, None, q, k, k, out, lse, *masks, *options, False)


def _feed_forward(tokens: int, width: int, hidden: int) -> None:
    x, w1, b1, w2, b2 = (
        torch.randn(shape, dtype=torch.bfloat16)
        for shape in ((tokens, width), (hidden, width), hidden, (width, hidden), width)
    )
    options = (None, "gelu", 0.0)
    y, pre = feed_forward.feed_forward_forward(x, w1, b1, w2, b2, *options)
    feed_forward.feed_forward_backward(y, x, w1, b1, w2, pre, *options, True)


def _norm(tokens: int, width: int) -> None:
    x = torch.randn(tokens, width, dtype=torch.bfloat16)
    weight = torch.randn(width)
    forward = (x, x, weight, weight, None, False, True, 1e-5, 0.0)
    y, total, mean, rstd = norm.add_norm_forward(*forward)
    norm.add_norm_backward(y, total, total, None, weight, mean, rstd, None, 0.0, True)


def _loss(tokens: int, width: int, vocab: int) -> None:
    hidden, weight = (torch.randn(n, width, dtype=torch.bfloat16) for n in (tokens, vocab))
    target = torch.arange(tokens) % vocab
    options = (-100, 0.0, 0.0, 0.0, "mean", True)
    cross_entropy.linear_cross_entropy_forward(hidden, weight, None, target, *options)


def _gated(tokens: int, width: int, hidden: int) -> None:
    x, gate, up, down = (
        torch.randn(shape, dtype=torch.bfloat16)
        for shape in ((tokens, width), (hidden, width), (hidden, width), (width, hidden))
    )
    options = (None, "silu", 0.0)
    y, pre, product = gated_feed_forward.gated_feed_forward_forward(x, gate, up, down, *options)
    saved = (pre, product)
    gated_feed_forward.gated_feed_forward_backward(y, x, gate, up, down, *saved, *options)


def _decode(lengths: tuple[int, ...], dim: int) -> None:
    q = torch.randn(len(lengths), 8, 1, dim, dtype=torch.bfloat16)
    cache = torch.randn(len(lengths), 2, max(lengths), dim, dtype=torch.bfloat16)
    real = torch.tensor(lengths, dtype=torch.int32)
    decode.decode_attention(q, cache, cache, real, None, None, None, -1, 0, 0.0, dim**-0.5)


def _prompt(queries: int, lengths: tuple[int, ...], dim: int, page_size: int) -> None:
    count = max(lengths) // page_size
    q = torch.randn(len(lengths), 4, queries, dim, dtype=torch.bfloat16)
    pages = torch.randn(len(lengths) * count, 2, page_size, dim, dtype=torch.bfloat16)
    table = torch.arange(len(pages), dtype=torch.int32).view(len(lengths), count)
    real = torch.tensor(lengths, dtype=torch.int32)
    decode.decode_attention(q, pages, pages, real, table, None, None, -1, 0, 0.0, dim**-0.5)


def _rotary(length: int, dim: int) -> None:
    q, k = (torch.randn(2, heads, length, dim, dtype=torch.bfloat16) for heads in (8, 2))
    cos = torch.randn(length, dim // 2)
    rotary.rotate(q, k, torch.empty_like(q), torch.empty_like(k), cos, cos, False, False)


CASES: dict[str, Callable[[], None]] = {
    "attention 512x512x64": lambda: _attention((512, 512), 64),
    "attention 512x512x64 causal": lambda: _attention((512, 512), 64, causal="top_left"),
    "attention 512x512x128 causal": lambda: _attention((512, 512), 128, causal="top_left"),
    "attention 257x511x72 bottom right, grouped": lambda: _attention(
        (257, 511), 72, causal="bottom_right", kv_heads=1
    ),
    "attention 512x512x64 window 100": lambda: _attention(
        (512, 512), 64, causal="top_left", window=100
    ),
    "attention 128x512x64 key lengths 512, 77": lambda: _attention(
        (128, 512), 64, key_lengths=(512, 77)
    ),
    "attention 256x256x64 bias": lambda: _attention((256, 256), 64, bias=True),
    "feed-forward 8192x32x64": lambda: _feed_forward(8192, 32, 64),
    "feed-forward 128x512x640": lambda: _feed_forward(128, 512, 640),
    "feed-forward 256x512x256": lambda: _feed_forward(256, 512, 256),
    "feed-forward 4x512x1024, few rows": lambda: _feed_forward(4, 512, 1024),
    "gated feed-forward 8192x32x64": lambda: _gated(8192, 32, 64),
    "gated feed-forward 128x512x320": lambda: _gated(128, 512, 320),
    "decode 2 sequences of 1000 and 300 keys x64": lambda: _decode((1000, 300), 64),
    "attention of a prompt of 256 over pages of 512 and 300 keys x64": lambda: _prompt(
        256, (512, 300), 64, 16
    ),
    "rotary 100x64": lambda: _rotary(100, 64),
    "norm 128x1024": lambda: _norm(128, 1024),
    "loss 32x16x5000": lambda: _loss(32, 16, 5000),
}
