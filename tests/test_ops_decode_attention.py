"""decode_attention: the oracle against attention, the CPU backend against the oracle, the op."""

import math

import pytest
import torch
import torch._dynamo.testing
from torch.library import opcheck

import fuseformer as ff
from fuseformer.testing import assert_close_to_reference

LENGTHS = (0, 1, 63, 113, 257)
OPTIONS = {
    "plain": {},
    "window": {"window": (20, 5)},
    "window_right": {"window": (-1, 0)},
    "not_causal": {"causal": False},
    "not_causal_window": {"causal": False, "window": (30, 2)},
    "not_causal_all": {
        "causal": False,
        "window": (-1, 5),
        "softcap": 3.0,
        "alibi_slopes": True,
        "sinks": True,
    },
    "softcap": {"softcap": 2.0},
    "alibi": {"alibi_slopes": True},
    "sinks": {"sinks": True},
    "negative_scale": {"scale": -0.3},
    "all": {"window": (60, -1), "softcap": 3.0, "alibi_slopes": True, "sinks": True},
}


def build(heads=6, kv_heads=2, sq=3, dim=40, page_size=0, lengths=LENGTHS, dtype=torch.float32):
    """Return q, both caches, the lengths and a block table; what no length covers is NaN."""
    batch, capacity = len(lengths), 272
    q = torch.randn(batch, sq, heads, dim).transpose(1, 2)
    # (batch, keys, heads, dim) in memory, which must cost no copy.
    caches = [torch.randn(batch, capacity, kv_heads, dim).transpose(1, 2) for _ in range(2)]
    for cache in caches:
        for b, length in enumerate(lengths):
            cache[b, :, length:] = math.nan
    table = None
    if page_size:
        count = capacity // page_size
        order = torch.randperm(batch * count + 3)[: batch * count]  # three pages are nobody's
        table = order.view(batch, count).int()
        pages = [
            torch.full((batch * count + 3, kv_heads, page_size, dim), math.nan) for _ in caches
        ]
        for paged, cache in zip(pages, caches, strict=True):
            split = cache.reshape(batch, kv_heads, count, page_size, dim).transpose(1, 2)
            paged[order] = split.flatten(0, 1)
        caches = pages
    # Entries past the last page in use are nobody's business.
    if table is not None:
        for b, length in enumerate(lengths):
            table[b, -(-length // page_size) :] = -1
    tensors = [x.to(dtype) for x in (q, *caches)]
    return *tensors, torch.tensor(lengths, dtype=torch.int32), table


def made(options, heads):
    makers = {"alibi_slopes": lambda: torch.rand(heads), "sinks": lambda: torch.randn(heads)}
    return {k: makers[k]() if v is True else v for k, v in options.items()}


def alone(q, k, v, causal=True, window=None, alibi_slopes=None, **options):
    """Return attention over keys that all count, what a mask hides being a bias."""
    sq, sk = q.shape[2], k.shape[2]
    distance = torch.arange(sk) - torch.arange(sk - sq, sk)[:, None]
    left, right = (math.inf if n < 0 else n for n in window or (-1, -1))
    hidden = (distance > (0 if causal else right)) | (distance < -left)
    bias = torch.zeros(sq, sk).double().masked_fill(hidden, -math.inf)
    if alibi_slopes is not None:
        bias = bias - alibi_slopes[:, None, None] * distance.abs()
    return ff.attention(q, k, v, bias=bias, return_lse=True, backend="reference", **options)


@pytest.mark.parametrize("page_size", [0, 16])
@pytest.mark.parametrize("name", OPTIONS)
def test_the_oracle_is_attention_on_each_sequence_alone(name, page_size):
    torch.manual_seed(0)
    q, k_cache, v_cache, lengths, table = build(page_size=page_size)
    options = made(OPTIONS[name], 6)
    out, lse = ff.decode_attention(
        *(x.double() for x in (q, k_cache, v_cache)),
        lengths,
        block_table=table,
        return_lse=True,
        backend="reference",
        **options,
    )
    for b, length in enumerate(lengths.tolist()):
        if table is None:
            k, v = k_cache[b], v_cache[b]
        else:
            pages = table[b].clamp(min=0).long()
            k, v = (c[pages].transpose(0, 1).flatten(1, 2) for c in (k_cache, v_cache))
        k, v = (x[None, :, :length].double() for x in (k, v))
        exact = alone(q[b, None].double(), k, v, **options)
        torch.testing.assert_close(out[b], exact[0][0])
        torch.testing.assert_close(lse[b], exact[1][0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "sq", "dim", "page_size"),
    [
        (6, 2, 1, 64, 0),
        (6, 2, 8, 40, 16),
        (5, 1, 2, 128, 0),
        (4, 4, 5, 17, 34),
        (6, 2, 63, 40, 0),
        (2, 1, 113, 24, 16),
        (5, 1, 257, 16, 34),
    ],
)
def test_cpu_against_the_oracle(dtype, name, heads, kv_heads, sq, dim, page_size):
    torch.manual_seed(0)
    *tensors, lengths, table = build(heads, kv_heads, sq, dim, page_size, dtype=dtype)
    options = made(OPTIONS[name], heads)
    call = {"block_table": table, "return_lse": True, **options}
    runs = (("cpu", dtype), ("reference", torch.float64), ("reference", dtype))
    results = [
        ff.decode_attention(*(x.to(p) for x in tensors), lengths, backend=backend, **call)
        for backend, p in runs
    ]
    assert results[0][0].dtype == dtype
    assert results[0][1].dtype == torch.float32
    for what, *judged in zip(("out", "lse"), *results, strict=True):
        assert_close_to_reference(*judged, name=what)


@pytest.mark.parametrize("options", [{}, {"causal": False}, {"window": (300, 0), "sinks": True}])
def test_cpu_takes_long_prompts_in_blocks(options):
    """A block of rows ends within the queries, with lengths on both sides of their number."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 4, 1000, 16), torch.randn(3, 2, 1300, 16), torch.randn(3, 2, 1300, 16)
    lengths = torch.tensor([700, 1000, 1255])
    call = {"return_lse": True, **made(options, 4)}
    found = ff.decode_attention(q, k, v, lengths, backend="cpu", **call)
    exact = ff.decode_attention(
        q.double(), k.double(), v.double(), lengths, backend="reference", **call
    )
    low = ff.decode_attention(q, k, v, lengths, backend="reference", **call)
    for what, *judged in zip(("out", "lse"), found, exact, low, strict=True):
        assert_close_to_reference(*judged, name=what)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("chunk", [1, 9, 64, 113, 1000])
@pytest.mark.parametrize("paged", [False, True])
def test_a_prompt_in_chunks_is_the_prompt_at_once(backend, chunk, paged):
    torch.manual_seed(0)
    total = 257
    q = torch.randn(1, 4, total, 16)
    k, v = torch.randn(1, 2, total, 16), torch.randn(1, 2, total, 16)
    expected = ff.attention(q, k, v, causal=True, backend="reference")
    caches = [torch.full((1, 2, 272, 16), math.nan) for _ in range(2)]
    table = None
    if paged:
        table = torch.randperm(17)[None].int()
    outs = []
    for start in range(0, total, chunk):
        rows = slice(start, min(start + chunk, total))
        for cache, new in zip(caches, (k, v), strict=True):
            cache[:, :, rows] = new[:, :, rows]
        given = caches
        if table is not None:
            pages = [c.view(2, 17, 16, 16).transpose(0, 1) for c in caches]
            given = [torch.empty_like(p).index_copy_(0, table[0].long(), p) for p in pages]
        length = torch.tensor([min(start + chunk, total)])
        outs.append(
            ff.decode_attention(q[:, :, rows], *given, length, block_table=table, backend=backend)
        )
    torch.testing.assert_close(torch.cat(outs, 2), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("paged", [False, True])
def test_rows_and_sequences_without_keys(backend, paged):
    q, k_cache, v_cache, lengths, table = build(page_size=16 * paged, lengths=(0, 2))
    call = {"block_table": table, "backend": backend, "return_lse": True}
    out, lse = ff.decode_attention(q, k_cache, v_cache, lengths, **call)
    seen = torch.tensor([[False, False, False], [False, True, True]])[:, None].expand(2, 6, 3)
    assert torch.equal(lse > -math.inf, seen)
    assert torch.equal((out != 0).any(-1), seen)
    sinks = torch.randn(6)
    out, lse = ff.decode_attention(q, k_cache, v_cache, lengths, sinks=sinks, **call)
    assert torch.equal(lse[0], sinks[:, None].expand(6, 3))
    assert not out[0].any()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("paged", [False, True])
def test_empty_batches_caches_and_queries(backend, paged):
    def call(batch, sq, capacity):
        table = torch.zeros(batch, capacity // 16, dtype=torch.int32) if paged else None
        cache = torch.zeros(0 if paged else batch, 2, 16 if paged else capacity, 8)
        out, lse = ff.decode_attention(
            torch.ones(batch, 4, sq, 8), cache, cache,
            torch.full((batch,), capacity, dtype=torch.int32),
            block_table=table, return_lse=True, backend=backend,
        )  # fmt: skip
        assert out.shape == (batch, 4, sq, 8)
        assert lse.shape == (batch, 4, sq)
        assert not out.any()

    call(0, 1, 16)
    call(2, 1, 0)
    call(2, 0, 16)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_bad_lengths_and_pages_are_bounded(backend):
    """Without `validate` they count as the whole cache, and as the nearest page."""
    torch.manual_seed(0)
    q, k_cache, v_cache, _, table = build(page_size=16, lengths=(272, 272))
    bad = table.clone()
    bad[0, 3], bad[1, 5] = 1000, -7
    nearest = bad.clamp(0, len(k_cache) - 1)
    k_cache, v_cache = (x.nan_to_num(0.5) for x in (k_cache, v_cache))
    results = [
        ff.decode_attention(
            q, k_cache, v_cache, torch.tensor(n, dtype=torch.int32), block_table=t, backend=backend
        )
        for n, t in (((300, -4), bad), ((272, 0), nearest))
    ]
    assert torch.equal(*results)


def test_validate_reads_the_device():
    q, k_cache, v_cache, lengths, table = build(page_size=16)

    def call(lengths, table):
        ff.decode_attention(q, k_cache, v_cache, lengths, block_table=table, validate=True)

    call(lengths, table)
    longer = lengths + torch.tensor([0, 0, 0, 0, 16], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"cache_lengths: got 273 for sequence 4, .* 0 to 272"):
        call(longer, table)
    with pytest.raises(ValueError, match=r"cache_lengths: got -1 for sequence 0"):
        call(lengths - 1, table)
    for page in (-1, len(k_cache)):
        wrong = table.clone()
        wrong[3, 7] = page  # key 112, the last of sequence 3
        with pytest.raises(ValueError, match=f"block_table: got page {page} for sequence 3, ent"):
            call(lengths, wrong)


def refusals():
    """Return calls by the beginning of their error."""
    q, k, n = torch.randn(2, 6, 1, 16), torch.randn(2, 2, 32, 16), torch.ones(2, dtype=torch.int32)
    table, strided = torch.zeros(2, 4, dtype=torch.int32), torch.randn(2, 2, 16, 32).mT
    good = {"q": q, "k_cache": k, "v_cache": k, "cache_lengths": n}

    def both(cache):
        return {"k_cache": cache, "v_cache": cache}

    changes = {
        "causal: got str, expected True or False": {"causal": "bottom_right"},
        "q: got 3 dimensions": {"q": q[0]},
        "k_cache: got dtype torch.bfloat16, expected torch.float32": {"k_cache": k.bfloat16()},
        "v_cache: got dtype torch.float16": {"v_cache": k.half()},
        "v_cache: got shape": {"v_cache": k[:, :, :9]},
        "k_cache: got batch size 1, expected 2": both(k[:1]),
        "k_cache: got head dim 8, expected 16": both(k[..., :8]),
        "k_cache: got 2 heads, expected a divisor of q's 5": {"q": q[:, :5]},
        "k_cache: got a page size of 0": both(k[:, :, :0]) | {"block_table": table},
        "k_cache: got stride 32 in the last dimension": {"k_cache": strided},
        "v_cache: got stride 32": {"v_cache": strided},
        "q: got stride 2": {"q": torch.randn(2, 6, 1, 32)[..., ::2]},
        "cache_lengths: got dtype torch.float32": {"cache_lengths": n.float()},
        "cache_lengths: got list": {"cache_lengths": [1, 1]},
        "cache_lengths: got shape": {"cache_lengths": n[:1]},
        "block_table: got dtype torch.int64": {"block_table": table.long()},
        "block_table: got shape": {"block_table": table[:1]},
        "sinks: got shape": {"sinks": torch.ones(2)},
        "alibi_slopes: got shape": {"alibi_slopes": torch.ones(2)},
        "window: got 3": {"window": 3},
        "softcap: got 0": {"softcap": 0},
        "scale: got nan": {"scale": math.nan},
        "q: requires a gradient": {"q": q.clone().requires_grad_()},
        "sinks: requires a gradient": {"sinks": torch.ones(6, requires_grad=True)},
        "backend: 'cuda' cannot serve": {"backend": "cuda"},
    }
    return {message: good | change for message, change in changes.items()}


@pytest.mark.parametrize("message", refusals())
def test_bad_input_is_refused_by_name(message):
    with pytest.raises((ValueError, TypeError), match=message):
        ff.decode_attention(**refusals()[message])


def test_inputs_that_require_gradients_are_fine_without_grad_mode():
    call = refusals()["q: requires a gradient"]
    with torch.no_grad():
        assert not ff.decode_attention(**call).requires_grad


@pytest.mark.parametrize("paged", [False, True])
def test_opcheck(paged):
    q, k_cache, v_cache, lengths, table = build(page_size=16 * paged, lengths=(5, 31))
    k_cache, v_cache = (x.nan_to_num() for x in (k_cache, v_cache))
    opcheck(
        torch.ops.fuseformer.decode_attention.default,
        (q, k_cache, v_cache, lengths, table, torch.rand(6), None, True, 20, -1, 0.0, 0.3, "cpu"),
    )


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_compiles_without_breaks_and_a_new_cache_recompiles_nothing(backend):
    counter = torch._dynamo.testing.CompileCounter()

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def decode(q, k, v, lengths):
        return ff.decode_attention(q, k, v, lengths, window=(30, 0), backend=backend)

    # Plain PyTorch is recorded with its sizes from outside of an op: it would compile anew.
    shapes = ((3, 5, 40), (3, 5, 57), (6, 9, 64), (7, 100, 120))
    for batch, sq, capacity in shapes[: 1 if backend == "reference" else 4]:
        q, k = torch.randn(batch, 4, sq, 16), torch.randn(batch, 2, capacity, 16)
        lengths = torch.arange(batch, dtype=torch.int32) + 20
        expected = ff.decode_attention(q, k, k, lengths, window=(30, 0), backend=backend)
        torch.testing.assert_close(decode(q, k, k, lengths), expected)
    assert counter.frame_count == 1


def test_autocast_and_explain():
    q, k = torch.randn(2, 6, 1, 16), torch.randn(2, 2, 32, 16).bfloat16()
    lengths = torch.full((2,), 9, dtype=torch.int32)
    with torch.autocast("cpu", torch.bfloat16), ff.explain() as decisions:
        out = ff.decode_attention(q, k, k, lengths, softcap=5.0)
    assert out.dtype == torch.bfloat16
    assert str(decisions).startswith("decode_attention 2x6x1x16 2x2x32x16 bfloat16 [softcap]: cpu,")
