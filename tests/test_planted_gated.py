"""Bugs planted in copies of the gated feed-forward kernels, of those for few rows and of the
matmul with an epilogue must be caught by the checks of the real ones.
"""

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from block_checks import FeedForwardCase, check_feed_forward
from gated_checks import GatedCase, check_gated, check_gated_dropout, served_by
from planted import planted_kernels
from ttsem.sanitize import KernelFault

pytestmark = pytest.mark.usefixtures("triton_on_cpu")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
Check = Callable[[ModuleType], None]


def gated(case: GatedCase) -> Check:
    return lambda kernels: check_gated(kernels, case)


def gated_dropout(regime: str, size: int = 72) -> Check:
    def check(kernels: ModuleType) -> None:
        with served_by(kernels, regime, chunked=True):
            check_gated_dropout(kernels, size, 0.5)

    return check


def plain(case: FeedForwardCase) -> Check:
    return lambda kernels: check_feed_forward(kernels, case)


EPILOGUE = gated(GatedCase((33, 24, 40, 16), "gelu_tanh", FP32))
RESIDENT = gated(GatedCase((70, 24, 72, 16), "silu", FP16, regime="resident", chunked=True))
FEW = gated(GatedCase((5, 40, 1100, 16), "silu", BF16, regime="few rows"))
FEW_RELU = plain(FeedForwardCase((5, 264, 40, 16), "relu", BF16))
MATMUL = plain(FeedForwardCase((17, 272, 136, 16), "gelu", BF16))

GATED, RESIDENT_FILE = "gated_feed_forward", "gated_feed_forward_resident.py"
DECODE, LINEAR = "feed_forward_decode.py", "linear_activation.py"

# module, file, correct text, planted text, the check that must fail
BUGS = {
    "rows past the end are written": (
        GATED,
        "gated_feed_forward.py",
        "inside = (rows < tokens)",
        "inside = (rows < tokens + 1)",
        EPILOGUE,
    ),
    "the gradient of the gate lacks the other factor": (
        GATED,
        "gated_feed_forward.py",
        "dpre = gradient * up * slope",
        "dpre = gradient * slope",
        EPILOGUE,
    ),
    "the gradient of up takes the gate before its activation": (
        GATED,
        "gated_feed_forward.py",
        "(gradient * gate).to(",
        "(gradient * pre).to(",
        EPILOGUE,
    ),
    "every block of the epilogue drops like the first": (
        GATED,
        "gated_feed_forward.py",
        "dropout_keep(seed, 0, 0, row, start,",
        "dropout_keep(seed, 0, 0, 0, start,",
        gated_dropout("epilogue"),
    ),
    "gate and up change places": (
        GATED,
        RESIDENT_FILE,
        "return gate_pre, up, w_gate,",
        "return up, gate_pre, w_gate,",
        RESIDENT,
    ),
    "dx forgets the up branch": (
        GATED,
        RESIDENT_FILE,
        "acc = tl.dot(dup, w_up, acc)",
        "acc = tl.dot(dup, w_up)",
        RESIDENT,
    ),
    "the ragged end of the weights is read": (
        GATED,
        RESIDENT_FILE,
        "RAGGED: tl.constexpr = HIDDEN % BLOCK_H != 0\n    left",
        "RAGGED: tl.constexpr = False\n    left",
        RESIDENT,
    ),
    "every chunk of tokens drops like the first": (
        GATED,
        RESIDENT_FILE,
        "dropout_keep(seed, 0, 0, first_row + row, start,",
        "dropout_keep(seed, 0, 0, row, start,",
        gated_dropout("resident"),
    ),
    "the weight gradients keep their last chunk only": (
        GATED,
        RESIDENT_FILE,
        "parts = [total.float().add_(part)",
        "parts = [part",
        RESIDENT,
    ),
    "parts of the hidden dimension overlap": (
        GATED,
        DECODE,
        "tl.minimum(first + SPLIT, HIDDEN)",
        "HIDDEN",
        FEW,
    ),
    "one part too few is summed": (
        GATED,
        DECODE,
        "for part in range(SPLITS):",
        "for part in range(SPLITS - 1):",
        FEW,
    ),
    "columns past the width count": (
        GATED,
        DECODE,
        "WIDTH % BLOCK_K != 0",
        "False",
        FEW,
    ),
    "few rows keep the activation where the product is due": (
        "feed_forward",
        DECODE,
        'keeps_act = activation == "relu" and',
        "keeps_act =",
        plain(FeedForwardCase((5, 264, 40, 16), "gelu", BF16)),
    ),
    "few rows lose their bias": (
        "feed_forward",
        DECODE,
        "if b2_ptr is not None:",
        "if b2_ptr is None:",
        FEW_RELU,
    ),
    "the matmul's blocks of units share the first one's bias": (
        "feed_forward",
        LINEAR,
        "tl.load(b_ptr + units,",
        "tl.load(b_ptr + units - start,",
        MATMUL,
    ),
    "the matmul reads past the width": (
        "feed_forward",
        LINEAR,
        "mask=columns < width - k",
        "mask=columns < width",
        MATMUL,
    ),
    "the matmul writes rows past the end": (
        "feed_forward",
        LINEAR,
        "inside = (rows < tokens)",
        "inside = (rows < tokens + 1)",
        MATMUL,
    ),
    "the matmul saves what comes after the activation": (
        "feed_forward",
        LINEAR,
        "act, _ = activate(acc, ACTIVATION)",
        "act = acc",
        MATMUL,
    ),
}


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_caught(name, tmp_path):
    module, file, correct, wrong, check = BUGS[name]
    with (
        planted_kernels(tmp_path, module, file, correct, wrong) as kernels,
        pytest.raises((AssertionError, KernelFault)),
    ):
        check(kernels)


@pytest.mark.parametrize(
    ("module", "checks"),
    {GATED: (EPILOGUE, RESIDENT, FEW), "feed_forward": (FEW_RELU, MATMUL)}.items(),
)
def test_the_copy_without_a_bug_passes(module, checks, tmp_path):
    """Else the tests above would pass for any reason at all."""
    text = "import torch\n"
    with planted_kernels(tmp_path, module, f"{module}.py", text, text) as kernels:
        for check in checks:
            check(kernels)
