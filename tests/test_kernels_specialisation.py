"""A new sequence length or batch size compiles nothing new: what a launch is specialised on."""

from itertools import pairwise

import pytest
import torch
from fuseformer.kernels import attention, feed_forward, gated_feed_forward, norm
from fuseformer.kernels.common import recorded_launches

BF16 = torch.bfloat16
#: Batch, queries, keys: odd and even, multiples of 16 and not, one of each.
SIZES = [(2, 1024, 1024), (1, 777, 2048), (3, 2049, 130), (16, 1, 513), (7, 48, 1)]


def meta(*shape, dtype=BF16):
    return torch.empty(shape, dtype=dtype, device="meta")


def dense(batch, queries, keys, dim, everything):
    """Run forward and backward as the ops do, with the layout of a projection's output."""
    q = meta(batch, queries, 6, dim).transpose(1, 2)
    k = meta(batch, keys, 2, dim).transpose(1, 2)
    bias = meta(1, 6, queries, keys) if everything else None
    slopes = sinks = meta(6, dtype=torch.float32) if everything else None
    seed = meta(dtype=torch.int64) if everything else None
    options = (seed, "top_left", 64 if everything else -1, -1, 0.0, 0.125, 0.1 * everything)
    lengths = meta(batch, dtype=torch.int32)
    given = (bias, None, lengths, slopes, sinks, *options)
    out, lse = attention.attention_forward(q, k, k, *given)
    attention.attention_backward(out, None, q, k, k, out, lse, *given, everything)


def packed(batch, queries, keys, dim):
    q, k = meta(batch * queries, 6, dim), meta(batch * keys, 2, dim)
    boundaries = meta(batch + 1, dtype=torch.int32)
    sequences = (boundaries, boundaries, queries, keys, None, None, None)
    options = (None, "bottom_right", -1, -1, 0.0, 0.125, 0.0)
    out, lse = attention.varlen_attention_forward(q, k, k, *sequences, *options)
    attention.varlen_attention_backward(out, lse, q, k, k, out, lse, *sequences, *options, False)


def blocks(tokens, width):
    """Run the feed-forward blocks of a width, and the norm, on so many tokens."""
    x, w1, w2 = meta(tokens, width), meta(4 * width, width), meta(width, 4 * width)
    seed = meta(dtype=torch.int64)
    y, pre = feed_forward.feed_forward_forward(x, w1, None, w2, None, seed, "gelu", 0.1)
    feed_forward.feed_forward_backward(y, x, w1, None, w2, pre, seed, "gelu", 0.1, False)
    norm.add_norm_forward(x, x, meta(width), None, seed, False, True, 1e-5, 0.1)
    y, *saved = gated_feed_forward.gated_feed_forward_forward(x, w1, w1, w2, None, "silu", 0.0)
    gated_feed_forward.gated_feed_forward_backward(y, x, w1, w1, w2, *saved, None, "silu", 0.0)


def compilations(run, *sizes):
    """Return what the compiler would be asked for."""
    with recorded_launches("sm_80") as specs:
        run(*sizes)
    assert specs
    sources = [spec.source() for spec in specs]
    return {
        (source.name, repr((source.signature, source.constants, source.attrs)))
        for source in sources
    }


@pytest.mark.parametrize("dim", [40, 64])
def test_attention_is_compiled_once_for_all_lengths(dim):
    found = [compilations(dense, *sizes, dim, False) for sizes in SIZES]
    assert all(first == second for first, second in pairwise(found))


def test_a_bias_is_compiled_for_rows_that_vectors_fit_and_for_others():
    """Its gradient is also written in one part or as several sums, and a single key has no step."""
    more = [compilations(dense, *sizes, 64, True) for sizes in SIZES if sizes[2] > 1]
    gradient = "attention_bias_gradient_kernel"
    found = [frozenset(kind for kind in each if kind[0] != gradient) for each in more]
    assert len(set(found)) == 2
    assert len({kind for each in more for kind in each if kind[0] == gradient}) <= 4


@pytest.mark.parametrize("dim", [40, 64])
def test_packed_attention_is_compiled_once_for_all_lengths(dim):
    found = [compilations(packed, *sizes, dim) for sizes in SIZES]
    assert all(first == second for first, second in pairwise(found))


@pytest.mark.parametrize(
    ("width", "tokens"), [(64, (8192, 9001, 20000)), (1024, (33, 512, 4095)), (1024, (1, 9, 16))]
)
def test_blocks_are_compiled_once_for_all_batches(width, tokens):
    """Tokens of a regime: resident, epilogue, few rows."""
    found = [compilations(blocks, count, width) for count in tokens]
    assert all(first == second for first, second in pairwise(found))
