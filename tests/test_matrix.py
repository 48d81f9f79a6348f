"""The choice of cases: every pair of values meets, in few cases, always the same ones."""

import os
import subprocess
import sys
from itertools import combinations, product
from pathlib import Path

import pytest
from matrix import case_name, cases

DIMENSIONS = {
    "shape": [(1, 1), (63, 113), (113, 63), (257, 111), (1, 257)],
    "dtype": ["bf16", "fp16", "fp32"],
    "causal": ["none", "top_left", "bottom_right"],
    "bias": [None, "bhqk", "hqk"],
    "window": [(-1, -1), (17, 3), (40, -1)],
    "softcap": [0.0, 5.0],
    "alibi": [False, True],
    "sinks": [False, True],
    "dropout": [0.0, 0.2],
}
OPTIONS = ("bias", "window", "softcap", "alibi", "sinks", "dropout")


def pairs(case):
    return {((a, case[a]), (b, case[b])) for a, b in combinations(DIMENSIONS, 2)}


def all_pairs(allowed=lambda case: True):
    every = (dict(zip(DIMENSIONS, v, strict=True)) for v in product(*DIMENSIONS.values()))
    return {pair for case in every if allowed(case) for pair in pairs(case)}


def test_every_pair_of_values_meets_in_few_cases():
    found = cases(DIMENSIONS, options=OPTIONS, full=False)
    assert set.union(*map(pairs, found)) == all_pairs()
    assert len(found) <= 20  # five shapes by three dtypes take fifteen
    assert found == cases(DIMENSIONS, full=False)


def test_cases_that_are_not_allowed_do_not_occur_and_cost_no_pair_that_can_be():
    def allowed(case):
        return not (case["bias"] and case["dtype"] == "fp16") and not (
            case["alibi"] and case["causal"] == "none" and case["sinks"]
        )

    found = cases(DIMENSIONS, allowed=allowed, full=False)
    assert all(map(allowed, found))
    assert set.union(*map(pairs, found)) == all_pairs(allowed)


def test_full_has_every_combination_with_at_most_two_options_or_all():
    small = {"shape": [1, 2, 3], "a": [0, 1], "b": [None, "x", "y"], "c": [False, True]}
    assert len(cases(small, full=True)) == 3 * 2 * 3 * 2
    small["d"] = [False, True]
    found = cases(small, options=("a", "b", "c", "d"), full=True)
    # off, one of five, one of nine pairs, all with either value of b
    assert len(found) == 3 * (1 + 5 + 9 + 2)
    assert {"shape": 1, "a": 1, "b": "y", "c": True, "d": True} in found


def test_one_dimension_and_none():
    assert cases({"a": [1, [2]]}, full=False) == [{"a": 1}, {"a": [2]}]
    assert cases({}, full=True) == [{}]


def test_bad_dimensions_are_refused():
    with pytest.raises(ValueError, match="'a' has no values"):
        cases({"a": []})
    with pytest.raises(ValueError, match="'b' is none of the dimensions"):
        cases({"a": [1]}, options=("b",))


def test_names_are_short():
    case = {"shape": (1, 2), "dtype": "torch.bfloat16", "sinks": True, "bias": None, "alibi": False}
    assert case_name(case) == "shape=(1,2)-dtype=bfloat16-sinks"


@pytest.mark.parametrize(("value", "count"), [("full", 4), ("subset", 4), (None, 4)])
def test_the_environment_decides(value, count):
    done = _in_a_process(value)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(value == "full"), "8" if value == "full" else str(count)]


def test_an_unknown_mode_is_refused():
    assert "want 'full'" in _in_a_process("fully").stderr


def _in_a_process(value):
    code = (
        "import matrix; print(matrix.FULL, len(matrix.cases(dict(a=[0, 1], b=[0, 1], c=[0, 1]))))"
    )
    environment = {k: v for k, v in os.environ.items() if k != "FUSEFORMER_SANITIZE"}
    environment["PYTHONPATH"] = str(Path(__file__).parent / "support")
    if value is not None:
        environment["FUSEFORMER_SANITIZE"] = value
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
