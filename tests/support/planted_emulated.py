"""What is said of a bug planted in CUDA C++ kernels, and those of attention for one head dim."""

import pytest
from attention_checks import check_dense
from emulated import EmulatorError, Kernels
from emulator_build import build, build_planted
from emulator_units import attention_unit

WRONG, RACE, INFLIGHT, BOUNDS = "exceeds", "race: ", "copy is on its way", "out of bounds"
UNINITIALISED, CONFLICTS, NAN = "nobody has written", "bank conflicts", "are NaN"


def planted(folder, head_dim, architecture=80, file="attention/mask.h", correct="", wrong=""):
    """Return the kernels with a text replaced in one file, every access being checked."""
    # What forward gives is judged before backward runs.
    unit = attention_unit([head_dim], backward=file != "attention/forward_kernel.h")
    kernels = Kernels(build_planted(build, unit, folder, file, correct, wrong))
    kernels.emulator.set_options(True, 1, "late", "exact", architecture)
    return kernels


def check_case(kernels, case):
    """Raise an error for whatever is wrong with a case: errors, then values, then conflicts."""
    check_dense(kernels, case)
    assert kernels.counters["ldmatrix_conflicts"] == 0, "bank conflicts"
    assert kernels.counters["shared_conflicts"] == 0, "bank conflicts of plain accesses"


def check_caught(how, check, *arguments):
    """Fail unless `check` fails as it must: with an error of the emulator, or over values."""
    with pytest.raises(AssertionError) as caught:
        check(*arguments)
    assert how in str(caught.value)
    assert isinstance(caught.value, EmulatorError) == (how not in (WRONG, CONFLICTS, NAN))
