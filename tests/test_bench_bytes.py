"""Bytes that kernels ask of global memory: counted as executed, and held against the least."""

import dataclasses

import pytest
import torch
import triton
import triton.language as tl

from bench import traffic
from bench.traffic_cases import CASES
from bench.traffic_least import LEAST

pytestmark = pytest.mark.usefixtures("triton_on_cpu")

ATTENTION = (
    "attention 257x511x72 bottom right, grouped",
    "attention 128x512x64 key lengths 512, 77",
    "attention 256x256x64 bias",
    "attention 512x512x64 causal",
    "attention 512x512x64 window 100",
)


@triton.jit
def copy_some_kernel(source_ptr, target_ptr, count, BLOCK: tl.constexpr):
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(source_ptr + places, mask=places < count, other=0.0)
    scale = tl.load(source_ptr)
    tl.store(target_ptr + places, (values * scale).to(tl.float32), mask=places < count)


def test_only_what_a_mask_lets_through_is_counted():
    source, target = torch.ones(40, dtype=torch.float16), torch.zeros(40)
    with traffic.counted() as launched:
        copy_some_kernel[(3,)](source_ptr=source, target_ptr=target, count=37, BLOCK=16)
    [row] = launched
    assert target.sum() == 37
    assert (row.kernel, row.read, row.written) == ("copy_some", 2 * (37 + 3), 4 * 37)
    assert row.least is None
    assert row.ratio is None
    assert not row.over
    before = (row.read, row.written)
    copy_some_kernel[(3,)](source_ptr=source, target_ptr=target, count=37, BLOCK=16)
    assert (row.read, row.written) == before, "counting ends with the block"


@pytest.mark.parametrize("case", ATTENTION)
def test_attention_asks_for_little_more_than_the_least(case):
    rows = traffic.measure(case)
    assert [row.kernel for row in rows] == [
        f"attention_{name}" for name in ("forward", "delta", "key_gradient", "query_gradient")
    ]
    for row in rows:
        assert 1 <= row.ratio <= 1.1, row
        assert not row.over


def test_a_prompt_over_pages_reads_them_where_they_lie():
    """By the forward kernel alone, which asks for the table once for each key besides."""
    (name,) = (case for case in CASES if "over pages" in case)
    (row,) = traffic.measure(name)
    assert row.kernel == "attention_forward"
    assert 1 <= row.ratio <= 1.1


@pytest.mark.parametrize("case", ["norm 128x1024", "rotary 100x64", "loss 32x16x5000"])
def test_others_do_too(case):
    for row in traffic.measure(case):
        assert 1 <= row.ratio <= 1.01, row


def test_a_kernel_over_its_limit_is_named(monkeypatch, capsys):
    """The check must be able to fail: a least of seven eighths leaves no room."""
    least = LEAST["attention_forward"]
    monkeypatch.setitem(LEAST, "attention_forward", lambda *launch: least(*launch) * 7 // 8)
    [row, *_] = traffic.measure(ATTENTION[1])
    assert row.over
    assert not dataclasses.replace(row, kernel="attention_delta").over
    monkeypatch.setattr(traffic, "measure", lambda case: [row])
    assert traffic.main(["--match", ATTENTION[1]]) == 1
    printed = capsys.readouterr()
    assert "over its limit" in printed.out
    assert "FAULT attention 128x512x64" in printed.err
