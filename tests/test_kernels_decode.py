"""The decode kernels, executed on the CPU, on awkward shapes against the oracle."""

import pytest
import torch
from decode_checks import LENGTHS, Case, arguments, check_decode
from fuseformer.kernels import decode as kernels
from fuseformer.kernels import decode_configs as configs
from fuseformer.kernels.common import recorded_launches
from interpreted import run_interpreted
from matrix import case_name, cases

import fuseformer as ff

pytest.importorskip("ttsem")
pytestmark = pytest.mark.usefixtures("triton_on_cpu")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

SOME = (0, 63, 257)
CASES = [
    # queries, groups, head dims and dtypes; 272 keys make several splits
    Case((6, 2), 1, 64, BF16),
    Case((5, 1), 8, 40, FP16, SOME),
    Case((5, 1), 2, 128, FP16, (1, 257)),
    Case((6, 2), 4, 40, FP32, (113,), capacity=144),
    Case((1, 1), 1, 128, FP32, (63,), capacity=80),
    Case((2, 1), 3, 256, BF16, (63,), capacity=64),
    # more rows than a tile takes
    Case((20, 1), 7, 40, BF16, (70,), capacity=80),
    Case((3, 1), 6, 16, FP32, (113, 40), capacity=128),
    # pages smaller than a block, as large, larger, and of no power of two
    Case((6, 2), 1, 64, BF16, page_size=16),
    Case((5, 1), 2, 64, FP16, SOME, 64, 320),
    Case((6, 2), 3, 40, BF16, (257,), 128, 384),
    Case((2, 1), 1, 128, FP16, SOME, 48, 288),
    Case((2, 1), 4, 64, FP32, (63,), 32, 64),
    Case((2, 2), 1, 16, FP32, SOME, 7, 273),
    # one split: a cache too small for more
    Case((6, 2), 3, 40, BF16, (0, 1, 63, 113), capacity=113),
    Case((5, 1), 5, 64, FP16, (0, 2, 63), 16, 64),
    # not causal, with a window to either side and without one
    Case((6, 2), 3, 64, BF16, window_right=-1),
    Case((2, 1), 5, 16, FP32, SOME, 16, window_left=30, window_right=1),
    Case((2, 1), 4, 40, FP16, (2, 63, 257), window_right=2, alibi=True),
    # more new tokens, the last of them for the decode kernel, and more keys than tokens or fewer
    Case((5, 1), 9, 64, BF16, SOME),
    Case((2, 1), 63, 40, FP16, SOME, 16),
    Case((2, 2), 64, 16, FP32, (63, 64, 100), capacity=112),
    # by the forward kernel
    Case((4, 2), 65, 64, BF16, (0, 1, 64, 65, 257)),
    Case((2, 1), 113, 40, FP16, SOME, 16),
    Case((2, 1), 257, 128, BF16, (300,), 128, 384),
    Case((2, 1), 1000, 64, BF16, (1000, 40), 48, 1008),
    Case((1, 1), 100, 16, FP32, (40, 257), 7, 273, window_left=20),
    Case((1, 1), 70, 256, FP16, (113,), 64, 128),
    Case((2, 1), 90, 64, BF16, (63, 257), 16, window_right=-1),
    Case((2, 1), 90, 32, FP16, (63, 257), window_left=30, window_right=2, alibi=True),
    Case((4, 2), 80, 24, FP32, (0, 113), 16, 128, 70, 4.0, True, True, -0.4),
    Case((2, 1), 300, 72, BF16, (290, 500), 64, 512, 90, 20.0, True, True, 1.5),
    Case((2, 1), 70, 16, FP32, (80, 80), 16, 96, broken_pages=True),
    # what acts on the logits, alone and together
    Case((6, 2), 3, 64, BF16, SOME, window_left=20),
    Case((2, 2), 2, 16, FP32, SOME, window_left=0),
    Case((2, 1), 2, 16, FP32, (257,), 16, window_left=100),
    Case((2, 2), 1, 16, FP32, SOME, window_left=10**10),
    Case((2, 1), 2, 16, FP32, SOME, softcap=3.0),
    Case((2, 1), 2, 16, FP32, SOME, alibi=True),
    Case((4, 2), 3, 16, FP32, SOME, sinks=True),
    Case((6, 2), 3, 40, BF16, (0, 2, 40), capacity=64, sinks=True),
    Case((2, 1), 2, 16, FP32, (63,), scale=-0.3),
    Case((4, 2), 5, 24, FP32, (0, 113), 16, 128, 70, 4.0, True, True, -0.4),
    Case((6, 2), 5, 64, BF16, LENGTHS, 48, 288, 70, 20.0, True, True, 1.5),
    Case((5, 1), 8, 128, FP16, (257,), 0, 272, 200, 20.0, True, True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_decode_matches_the_oracle_and_repeats_to_the_last_bit(case):
    check_decode(kernels, case)


# Heads, queries, head dim and cache lengths; the rest of a call are options.
SHAPES = (
    ((6, 2), 1, 40, (0, 63, 257)),
    ((5, 1), 3, 72, (111, 1)),
    ((2, 2), 8, 96, (113,)),
    ((4, 2), 70, 40, (63, 257)),
)
OPTIONS = {
    "page_size": (0, 16),
    "window_left": (-1, 40),
    "window_right": (0, -1, 2),
    "softcap": (0.0, 15.0),
    "alibi": (False, True),
    "sinks": (False, True),
}
MATRIX = cases({"dtype": (BF16, FP16, FP32), "shape": SHAPES, **OPTIONS}, options=tuple(OPTIONS))


@pytest.mark.parametrize("case", MATRIX, ids=case_name)
def test_any_two_options_together_match_the_oracle(case):
    options = {name: case[name] for name in OPTIONS}
    heads, queries, head_dim, lengths = case["shape"]
    check_decode(kernels, Case(heads, queries, head_dim, case["dtype"], lengths, **options))


@pytest.mark.parametrize("page_size", [0, 16])
def test_several_splits_give_what_one_gives(page_size, monkeypatch):
    call = arguments(Case((2, 2), 2, 16, FP32, (0, 63, 257), page_size, sinks=True))
    found = {}
    for programs in (1, 18, 10**6):
        monkeypatch.setitem(configs.PROGRAMS, "sm_80", programs)
        found[configs.choose_splits(6, 272, 32, "sm_80")] = kernels.decode_attention(**call)
    assert sorted(found) == [1, 3, 4]
    for splits in (3, 4):
        for a, b in zip(found[splits], found[1], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_splits_are_chosen_by_shapes():
    choose = configs.choose_splits
    assert choose(1, 100, 64, "sm_80") == 1  # too few keys
    assert choose(300, 100_000, 64, "sm_80") == 1  # enough programs without
    assert choose(32, 100_000, 64, "sm_80") == 6
    assert choose(1, 10**7, 64, "sm_80") == configs.MOST_SPLITS


@pytest.mark.parametrize("queries", [2, 70])
def test_bad_lengths_and_pages_stay_within_the_cache(queries):
    """The sanitizer fails any access outside of the tensors."""
    call = arguments(Case((2, 1), queries, 16, FP32, (64, 64), 16, 64))
    table = call["block_table"].clone()
    table[0, 3], table[1, 2] = 1000, -7
    nearest = table.clamp(0, len(call["k_cache"]) - 1)
    for name in ("k_cache", "v_cache"):
        call[name] = call[name].nan_to_num(0.5)
    results = []
    far = (2**31 + 5, -(2**40))
    for lengths, pages in (((300, -4), table), (far, table), ((64, 0), nearest)):
        for dtype in (torch.int64,) if lengths is far else (torch.int32, torch.int64):
            changed = {"cache_lengths": torch.tensor(lengths, dtype=dtype), "block_table": pages}
            results.append(kernels.decode_attention(**(call | changed))[0])
    assert len(results) == 5
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_tables_and_lengths_may_lie_in_any_way():
    call = arguments(Case((2, 1), 70, 16, FP32, (60, 33), 16, 64))
    changed = {
        "block_table": call["block_table"].t().contiguous().t(),
        "cache_lengths": call["cache_lengths"].repeat_interleave(2)[::2],
        "alibi_slopes": torch.tensor([0.5]).expand(2),
        "sinks": torch.tensor([1.0, 7.0, 2.0])[::2],
    }
    plain = {name: x.contiguous() for name, x in changed.items()}
    for few in ({}, {"q": call["q"][:, :, :3]}):
        results = [kernels.decode_attention(**call | given | few) for given in (changed, plain)]
        assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("batch", "queries", "capacity"),
    [(0, 1, 16), (2, 0, 16), (2, 1, 0), (0, 70, 16), (2, 70, 0), (2, 70, 16)],
)
@pytest.mark.parametrize("pages", [False, True])
def test_empty_batches_queries_and_caches(batch, queries, capacity, pages):
    cache = torch.zeros(0 if pages else batch, 2, 16 if pages else capacity, 16)
    table = torch.zeros(batch, 1, dtype=torch.int32) if pages else None
    q = torch.ones(batch, 4, queries, 16)
    lengths = torch.full((batch,), 5, dtype=torch.int32)
    if not pages and capacity:
        lengths *= 0
    sinks = torch.tensor([1.0, 2.0, 3.0, 4.0])
    out, lse = kernels.decode_attention(
        q, cache, cache, lengths, table, None, sinks, -1, 0, 0.0, 1.0
    )
    assert not out.any()
    assert torch.equal(lse, sinks[:, None].expand(batch, 4, queries))


PAST_32_BITS = """
import torch
from fuseformer import reference
from fuseformer.kernels import decode as kernels

room = torch.empty(2**31 + 2**28, dtype=torch.float16)  # of which little is ever touched
page = torch.tensor([[1]], dtype=torch.int32)
far = (2**31 + 64, 16, 16, 1)
for shape, strides, table in (
    ((2, 1, 16, 16), far, None),
    ((2, 1, 16, 16), far, page),
    ((1, 1, 18, 16), (0, 0, 2**27, 1), None),
):
    cache = room.as_strided(shape, strides).normal_()
    batch = shape[0] if table is None else 1
    lengths = torch.full((batch,), shape[2])
    for queries in (1, 65):
        q = torch.randn(batch, 1, queries, 16).half()
        out, _ = kernels.decode_attention(
            q, cache, cache, lengths, table, None, None, -1, 0, 0.0, 0.25
        )
        exact, _ = reference.decode_attention(
            q, cache.contiguous(), cache.contiguous(), lengths, block_table=table, scale=0.25
        )
        torch.testing.assert_close(out, exact, rtol=0, atol=4e-3)
print("reached")
"""


def test_caches_of_more_than_2_to_the_31_elements():
    """In Triton's interpreter, which does not shadow the memory that a tensor spans."""
    assert run_interpreted(PAST_32_BITS) == "reached\n"


@pytest.mark.parametrize("queries", [2, 70])
def test_the_public_op_is_served_by_the_kernels(queries):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, queries, 24), torch.randn(9, 2, 16, 24), torch.randn(9, 2, 16, 24)
    lengths, table = torch.tensor([20, 33]), torch.tensor([[3, 1, 0], [7, 8, 2]]).int()
    call = {"block_table": table, "window": (25, -1), "sinks": torch.randn(4), "return_lse": True}
    with ff.explain() as decisions:
        out, lse = ff.decode_attention(q, k, v, lengths, backend="triton", validate=True, **call)
    assert "[block_table, sinks, window]: triton" in str(decisions)
    exact = ff.decode_attention(q, k, v, lengths, backend="reference", **call)
    torch.testing.assert_close((out, lse), exact, rtol=1e-5, atol=1e-5)


def test_new_lengths_batches_and_capacities_compile_nothing():
    """Of each kernel, contiguous and paged, there is one specialisation for all of them."""
    seen = set()
    with recorded_launches("sm_80") as specs:
        for page_size in (0, 16):
            for batch, queries, capacity in (
                (1, 1, 16), (2, 1, 272), (3, 2, 400), (300, 1, 304), (16, 1, 1040), (7, 2, 112),
                (1, 65, 112), (2, 300, 272), (3, 77, 400),
            ):  # fmt: skip
                lengths = (capacity // 2,) * batch
                case = Case((6, 2), queries, 40, BF16, lengths, page_size, capacity, capacity)
                kernels.decode_attention(**arguments(case))
    for spec in specs:
        source = spec.source()
        seen.add((source.name, *map(repr, (source.signature, source.constants, source.attrs))))
    assert sorted(name for name, *_ in seen) == [
        *["attention_forward_kernel"] * 2,
        *["decode_attention_kernel"] * 2,
        "decode_merge_kernel",
    ]
