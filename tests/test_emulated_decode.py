"""The CUDA C++ decode kernels, executed on the CPU from the source that ships."""

import pytest
import torch
from decode_checks import Case, arguments, check_decode, expected_results
from emulated import Kernels
from emulator_build import build

import fuseformer as ff
from fuseformer.cuda import decode
from fuseformer.testing import assert_close_to_reference

BF16, FP16 = torch.bfloat16, torch.float16
LONG = (0, 1, 63, 600, 1000)


@pytest.fixture(scope="module")
def plain():
    return Kernels(build("plain"))


@pytest.fixture(scope="module")
def shadow():
    return Kernels(build("shadow"))


CASES = [
    Case((8, 2), 1, 128, BF16),
    Case((6, 2), 1, 64, FP16),
    Case((5, 1), 4, 32, BF16),
    Case((8, 1), 8, 96, FP16),
    Case((2, 2), 3, 256, BF16),
    Case((4, 4), 1, 64, BF16, LONG, capacity=1024),
    Case((8, 2), 2, 128, FP16, LONG, capacity=1024, window_left=700),
    Case((8, 2), 2, 64, BF16, window_left=20),
    Case((8, 2), 1, 64, BF16, page_size=16),
    Case((8, 2), 5, 128, BF16, LONG, page_size=8, capacity=1024),
    Case((4, 2), 2, 32, FP16, page_size=16, broken_pages=True, window_left=40),
    Case((2, 1), 1, 256, FP16, LONG, page_size=64, capacity=1024),
    # not causal, with a window to either side and without one
    Case((4, 2), 3, 64, BF16, window_right=-1),
    Case((4, 2), 5, 32, FP16, (2, 63, 257), 16, window_left=30, window_right=1),
    Case((2, 1), 8, 96, BF16, LONG, capacity=1024, window_right=3),
    # as many new tokens as the decode kernel takes, then those that the forward kernel does
    Case((4, 2), 16, 64, BF16, (9, 63, 257), 16),
    Case((8, 2), 17, 128, FP16, (0, 9, 63, 257)),
    Case((2, 1), 113, 64, BF16, (0, 63, 113, 257)),
    Case((2, 1), 130, 32, FP16, (40, 257), window_left=30, window_right=2),
    Case((2, 1), 100, 256, BF16, (90, 257), window_right=-1),
    Case((1, 1), 1000, 64, BF16, (1000,), capacity=1024, window_left=500),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("rounding", ["exact", "chained", "truncating"])
def test_against_the_oracle(case, rounding, plain):
    plain.emulator.set_options(False, 1, "late", rounding, 80)
    check_decode(plain, case)
    assert plain.counters["ldmatrix_conflicts"] == 0


@pytest.mark.parametrize("landing", ["late", "early", "random"])
@pytest.mark.parametrize("case", [c for c in CASES[-15:] if c.queries < 1000], ids=str)
def test_no_access_is_wrong_in_any_order(case, landing, shadow):
    shadow.emulator.set_options(True, 3, landing, "exact", 86)
    check_decode(shadow, case)


@pytest.mark.parametrize("splits", [1, 2, 3, 7, 40])
def test_any_number_of_splits_gives_the_same_answer(splits, shadow, monkeypatch):
    """More splits than steps too: some then have nothing to do."""
    monkeypatch.setattr(decode, "_splits", lambda *_: splits)
    shadow.emulator.set_options(True, splits, "random", "exact", 80)
    check_decode(shadow, Case((4, 2), 2, 64, BF16, (0, 1, 130, 400), capacity=400))


def test_the_public_op_and_what_it_refuses(plain):
    call = arguments(Case((4, 2), 2, 64, BF16, page_size=16))
    names = ("q", "k_cache", "v_cache", "cache_lengths")
    inputs = [call[name] for name in names]
    with plain.installed():
        out = ff.decode_attention(*inputs, block_table=call["block_table"], backend="cuda")
        with pytest.raises(ValueError, match="at most 16 new tokens over pages, not 17"):
            ff.decode_attention(
                inputs[0].repeat(1, 1, 17, 1)[:, :, :17],
                *inputs[1:],
                block_table=call["block_table"],
                backend="cuda",
            )
        with pytest.raises(ValueError, match="do not take softcap"):
            ff.decode_attention(
                *inputs, block_table=call["block_table"], softcap=3.0, backend="cuda"
            )
    exact, low = (expected_results(call, dtype)[0] for dtype in (torch.float64, BF16))
    assert_close_to_reference(out, exact, low)


@pytest.mark.parametrize(
    ("place", "wrong", "said"),
    [
        (5, torch.zeros(3, dtype=torch.int32), r"lengths: got shape \(3,\), expected \(2,\)"),
        (2, torch.zeros(2, 2, 31, 64, dtype=BF16), r"v_cache: got shape \(2, 2, 31, 64\)"),
        (6, torch.zeros(2, 4), "block_table: got float32, expected int32"),
        (9, 0, "splits: got 0, expected 1 to"),
        (9, 2, "partial_out: got None, expected float32"),
    ],
)
def test_the_compiled_op_names_what_is_wrong(place, wrong, said, plain):
    q, cache = torch.zeros(2, 4, 1, 64, dtype=BF16), torch.zeros(2, 2, 32, 64, dtype=BF16)
    lengths = torch.zeros(2, dtype=torch.int32)
    given = [q, cache, cache, q.clone(), torch.zeros(2, 4, 1), lengths, None, None, None]
    given += [1, -1, 0, 1.0]
    given[place] = wrong
    with pytest.raises(ValueError, match=said):
        plain.ops.attention_decode(*given)


def test_the_loop_over_keys_has_no_bank_conflict(shadow, monkeypatch):
    """What there is, is of the end of a block: more keys have no more of it."""
    monkeypatch.setattr(decode, "_splits", lambda *_: 1)
    shadow.emulator.set_options(False, 1, "late", "exact", 80)
    counts = []
    for length in (64, 640):
        check_decode(shadow, Case((8, 2), 2, 128, BF16, (length,), capacity=640))
        counts.append(shadow.counters)
    assert counts[1]["ldmatrix"] > 5 * counts[0]["ldmatrix"]
    assert [c["ldmatrix_conflicts"] for c in counts] == [0, 0]
    assert counts[0]["shared_conflicts"] == counts[1]["shared_conflicts"]
