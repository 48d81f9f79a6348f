"""Bugs planted in copies of the norm kernels must be caught by the checks of the real ones."""

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from norm_checks import NormCase, check_norm, check_norm_dropout, check_norm_of_the_sum
from planted import planted_kernels
from ttsem.sanitize import KernelFault

pytestmark = pytest.mark.usefixtures("triton_on_cpu")

FP32 = torch.float32


def norm(case: NormCase) -> Callable[[ModuleType], None]:
    return lambda kernels: check_norm(kernels, case)


def norm_dropout(kernels: ModuleType) -> None:
    check_norm_dropout(kernels, 17, 96, 0.5)


ROWS = NormCase(9, 40, FP32)
PRE = NormCase(9, 40, FP32, dropout_p=0.3, rms=True, pre=True)

# correct text, planted text, the check that must fail
BUGS = {
    "columns past the width count in the variance": (
        "centred = tl.where(real[None, :], total - mean[:, None], 0.0)",
        "centred = total - mean[:, None]",
        norm(ROWS),
    ),
    "eps is left out": (
        "tl.sum(centred * centred, 1) / WIDTH + eps",
        "tl.sum(centred * centred, 1) / WIDTH",
        norm(NormCase(9, 40, FP32, spread=3e-3)),
    ),
    "the gradient keeps its mean": (
        "normal * along[:, None] - shift[:, None]",
        "normal * along[:, None]",
        norm(ROWS),
    ),
    "the weight gradient keeps its last rows only": (
        "dweight += tl.sum(dy * normal, 0)",
        "dweight = tl.sum(dy * normal, 0)",
        norm(NormCase(17, 40, FP32, programs=2)),
    ),
    "two rows of a pair drop alike": (
        "halves = (rows // 8 % 2)",
        "halves = (rows // 16 % 2)",
        norm_dropout,
    ),
    "dropped elements keep their gradient": (
        "dtotal = tl.where(keep, dtotal * dropout_scale, 0.0)",
        "dtotal = dtotal * dropout_scale",
        norm_dropout,
    ),
    "the next residual is normalised before it is rounded": (
        "total = rounded.to(tl.float32)",
        "total = total.to(tl.float32)",
        check_norm_of_the_sum,
    ),
    "the gradient of the next residual is left out": (
        "dtotal += past",
        "dtotal += 0.0",
        norm(PRE),
    ),
    "the saved sum is dropped from a second time": (
        "        normal *= rstd[:, None]\n",
        "        if residual_ptr is None:\n"
        "            keep = _row_keep(seed, rows, threshold, BLOCK_N)\n"
        "            normal = tl.where(keep, normal * dropout_scale, 0.0)\n"
        "        normal *= rstd[:, None]\n",
        norm(PRE),
    ),
    "a row past the last one is written": (
        "inside = (rows < tokens)[:, None] & real[None, :]",
        "inside = (rows < tokens + 1)[:, None] & real[None, :]",
        norm(ROWS),
    ),
}


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_caught(name, tmp_path):
    correct, wrong, check = BUGS[name]
    with (
        planted_kernels(tmp_path, "norm", "norm.py", correct, wrong) as kernels,
        pytest.raises((AssertionError, KernelFault)),
    ):
        check(kernels)


def test_the_copy_without_a_bug_passes(tmp_path):
    """Else the tests above would pass for any reason at all."""
    text = "import torch\n"
    with planted_kernels(tmp_path, "norm", "norm.py", text, text) as kernels:
        for check in (norm(ROWS), norm(PRE), check_norm_of_the_sum, norm_dropout):
            check(kernels)
