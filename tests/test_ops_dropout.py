"""The dropout mask of the CPU backend is that of the oracle, bit for bit."""

import pytest
import torch

from fuseformer import philox
from fuseformer.cpu import dropout


@pytest.mark.parametrize("p", [0.0, 0.1, 0.97, 1.0])
@pytest.mark.parametrize(
    ("batches", "heads", "rows", "columns"),
    [
        (range(1), range(1), range(40), range(70)),
        ([3, 0, 7], range(2, 4), range(5, 39), range(37, 101)),
        (range(2), [5], range(17, 18), range(31, 32)),
        (range(2), range(3), range(4, 4), range(8)),
        (range(2), range(3), range(4), range(64, 64)),
        (range(0), range(3), range(4), range(8)),
        (range(1), range(2), range(300), range(700)),  # several blocks, some across heads
    ],
)
def test_equals_the_oracle(p, batches, heads, rows, columns):
    for seed in (0, -1, 2**63 - 1, 123456789):
        seed = torch.tensor(seed)
        expected = philox.keep_mask(seed, p, batches, heads, rows, columns.stop)
        actual = dropout.keep_mask(seed, p, batches, heads, rows, columns)
        assert torch.equal(actual, expected[..., columns.start :])


def test_threads_change_nothing(monkeypatch):
    arguments = (torch.tensor(5), 0.3, range(2), range(2), range(99), range(99))
    expected = dropout.keep_mask(*arguments)
    monkeypatch.setattr(dropout, "_ELEMENTS_PER_THREAD", 1)
    monkeypatch.setattr(dropout, "_COUNTERS_PER_BLOCK", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch.equal(dropout.keep_mask(*arguments), expected)
