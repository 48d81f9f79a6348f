"""Bugs planted in copies of the rotary kernel must be caught by the checks of the real one."""

import pytest
import torch
from planted import planted_kernels
from rotary_checks import RotaryCase, check_rotary
from ttsem.sanitize import KernelFault

pytestmark = pytest.mark.usefixtures("triton_on_cpu")

FP32 = torch.float32
PLAIN = RotaryCase((2, 5, 3, 17, 24), 7, FP32)
PAIRS = RotaryCase((2, 5, 3, 17, 24), 7, FP32, interleaved=True)
BATCHED = RotaryCase((2, 5, 3, 17, 24), 12, FP32, batched=True)
LONG = RotaryCase((1, 2, 1, 150, 16), 8, FP32)

# correct text, planted text, the case that must fail
BUGS = {
    "the second half turns the wrong way": (
        "turned = second * cos + first * sin  #",
        "turned = second * cos - first * sin  #",
        PLAIN,
    ),
    "pairs take their sines the wrong way round": (
        "tl.join(first * cos - second * sin, second * cos + first * sin)",
        "tl.join(first * cos + second * sin, second * cos - first * sin)",
        PAIRS,
    ),
    "rotating back turns forth": (".to(tl.float32) * direction", ".to(tl.float32)", PLAIN),
    "the halves lie half a head apart": ("x + HALF + pair", "x + HEAD_DIM // 2 + pair", PLAIN),
    "pairs past the rotated part turn too": ("both < 2 * HALF", "both < HEAD_DIM", PAIRS),
    "the rest of a head is left out": (
        "if not IN_PLACE and HEAD_DIM > 2 * HALF:",
        "if IN_PLACE and HEAD_DIM > 2 * HALF:",
        PLAIN,
    ),
    "the last column of a head is written past its end": (
        "real & (rest < HEAD_DIM)",
        "real & (rest <= HEAD_DIM)",
        PLAIN,
    ),
    "a row past the last one is written": (
        "real = rows < seqlen - start",
        "real = rows <= seqlen - start",
        PLAIN,
    ),
    "the last group of heads goes one too far": (
        "tl.minimum(group * HEADS + HEADS, heads)",
        "group * HEADS + HEADS",
        PLAIN,
    ),
    "k is rotated from its second group on": ("group - groups_q, heads_k", "group, heads_k", PLAIN),
    "every sequence reads the first one's table": ("if BATCHED:", "if not BATCHED:", BATCHED),
    "every block reads the first one's table": (
        "table = start.to(tl.int64) * HALF",
        "table = start.to(tl.int64) * 0",
        LONG,
    ),
    "strides are rounded to multiples they are not": (
        '8 if all(n % 8 == 0 for n in steps_and_dims) else 1',
        "8",
        RotaryCase((2, 3, 1, 9, 12), 5, FP32, layout="packed"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_caught(name, tmp_path):
    correct, wrong, case = BUGS[name]
    with (
        planted_kernels(tmp_path, "rotary", "rotary.py", correct, wrong) as kernels,
        pytest.raises((AssertionError, KernelFault)),
    ):
        check_rotary(kernels, case)


def test_the_copy_without_a_bug_passes(tmp_path):
    """Else the tests above would pass for any reason at all."""
    text = "import torch\n"
    with planted_kernels(tmp_path, "rotary", "rotary.py", text, text) as kernels:
        for case in (PLAIN, PAIRS, BATCHED, LONG):
            check_rotary(kernels, case)
