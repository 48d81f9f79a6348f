"""Bugs planted in copies of the feed-forward and loss kernels must be caught by the checks
of the real ones.
"""

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from block_checks import (
    CrossEntropyCase,
    FeedForwardCase,
    check_cross_entropy,
    check_feed_forward,
    check_feed_forward_dropout,
    regime,
)
from planted import planted_kernels
from ttsem.sanitize import KernelFault

pytestmark = pytest.mark.usefixtures("triton_on_cpu")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
Check = Callable[[ModuleType], None]


def feed_forward(case: FeedForwardCase) -> Check:
    return lambda kernels: check_feed_forward(kernels, case)


def feed_forward_dropout(resident: bool) -> Check:
    def check(kernels: ModuleType) -> None:
        with regime(kernels, resident, chunked=True):
            check_feed_forward_dropout(kernels, 72, 0.5)

    return check


def cross_entropy(case: CrossEntropyCase) -> Check:
    return lambda kernels: check_cross_entropy(kernels, case)


EPILOGUE = FeedForwardCase((33, 24, 40, 16), "gelu_tanh", FP32)
RESIDENT = FeedForwardCase((70, 24, 72, 16), "silu", FP16, resident=True, chunked=True)
WIDE_RESIDENT = FeedForwardCase((17, 40, 40, 136), "relu", BF16, resident=True)
LOSS = CrossEntropyCase((7, 16, 50), FP32)
Z_LOSS = CrossEntropyCase((7, 16, 50), FP32, z_loss=0.1)
LONG_LOSS = CrossEntropyCase((5, 8, 8100), FP32, ignored=0.0)

# module, file, correct text, planted text, the check that must fail
BUGS = {
    # feed-forward, epilogue
    "rows past the end are written": (
        "feed_forward",
        "feed_forward.py",
        "inside = (rows < tokens) & (units < HIDDEN)",
        "inside = (rows < tokens + 1) & (units < HIDDEN)",
        feed_forward(EPILOGUE),
    ),
    "units past the hidden width are written": (
        "feed_forward",
        "feed_forward.py",
        "inside = (rows < tokens) & (units[None, :] < HIDDEN)",
        "inside = (rows < tokens) & (units[None, :] <= HIDDEN)",
        feed_forward(EPILOGUE),
    ),
    "the slope of the activation is left out": (
        "feed_forward",
        "feed_forward.py",
        "gradient *= slope",
        "gradient *= 1.0",
        feed_forward(EPILOGUE),
    ),
    "the slope of the tanh in GELU lacks a factor": (
        "feed_forward",
        "activations.py",
        "(1.0 + 3.0 * GELU_CUBIC * square)",
        "(1.0 + GELU_CUBIC * square)",
        feed_forward(EPILOGUE),
    ),
    "the slope of exact GELU forgets the density": (
        "feed_forward",
        "activations.py",
        "slope = below + x * INVERSE_SQRT_TWO_PI * tl.exp(-0.5 * x * x)",
        "slope = below",
        feed_forward(FeedForwardCase((9, 24, 40, 16), "gelu", FP32)),
    ),
    "the bias gradient keeps its last block only": (
        "feed_forward",
        "feed_forward.py",
        "total += tl.sum(gradient, 0)",
        "total = tl.sum(gradient, 0)",
        feed_forward(EPILOGUE),
    ),
    "the gradient of dropped units is not scaled": (
        "feed_forward",
        "feed_forward.py",
        "gradient = tl.where(keep, gradient * dropout_scale, 0.0)",
        "gradient = tl.where(keep, gradient, 0.0)",
        feed_forward(FeedForwardCase((17, 24, 40, 16), "relu", BF16, 0.5)),
    ),
    "every block of the epilogue drops like the first": (
        "feed_forward",
        "feed_forward.py",
        "keep = dropout_keep(seed, 0, 0, row, start, threshold, BLOCK_M, BLOCK_H)",
        "keep = dropout_keep(seed, 0, 0, 0, start, threshold, BLOCK_M, BLOCK_H)",
        feed_forward_dropout(resident=False),
    ),
    # feed-forward, resident
    "every chunk of tokens drops like the first": (
        "feed_forward",
        "feed_forward_resident.py",
        "dropout_keep(seed, 0, 0, first_row + row, start,",
        "dropout_keep(seed, 0, 0, row, start,",
        feed_forward_dropout(resident=True),
    ),
    "hidden blocks share the first one's bias": (
        "feed_forward",
        "feed_forward_resident.py",
        "tl.load(b1_ptr + start + units",
        "tl.load(b1_ptr + units",
        feed_forward(RESIDENT),
    ),
    "the ragged end of the weights is read": (
        "feed_forward",
        "feed_forward_resident.py",
        "RAGGED: tl.constexpr = HIDDEN % BLOCK_H != 0\n    left",
        "RAGGED: tl.constexpr = False\n    left",
        feed_forward(RESIDENT),
    ),
    "columns past the width are taken as input": (
        "feed_forward",
        "feed_forward_tiles.py",
        "if WIDTH != BLOCK_W:",
        "if WIDTH > BLOCK_W:",
        feed_forward(RESIDENT),
    ),
    "tokens past the end count in the bias gradient": (
        "feed_forward",
        "feed_forward_resident.py",
        "tl.where(tl.arange(0, BLOCK_M)[:, None] < left, dpre, 0.0)",
        "dpre",
        feed_forward(WIDE_RESIDENT),
    ),
    "dx takes the gradient before the activation's slope": (
        "feed_forward",
        "feed_forward_resident.py",
        "dpre *= slope",
        "dpre *= 1.0",
        feed_forward(RESIDENT),
    ),
    "the bias gradient of each chunk lands in the first": (
        "feed_forward",
        "feed_forward_resident.py",
        "db1[start // block_m :]",
        "db1",
        feed_forward(RESIDENT),
    ),
    "the weight gradient keeps its last chunk only": (
        "feed_forward",
        "feed_forward_resident.py",
        "dw1 = part1 if dw1 is None else dw1.float().add_(part1)",
        "dw1 = part1",
        feed_forward(RESIDENT),
    ),
    # cross entropy
    "the sum of exponentials is not rescaled": (
        "cross_entropy",
        "cross_entropy.py",
        "total = total * tl.exp(maximum - shift) + ",
        "total = total + ",
        cross_entropy(LONG_LOSS),
    ),
    "blocks of forbidden classes are not guarded": (
        "cross_entropy",
        "cross_entropy.py",
        'shift = tl.where(new_maximum == -float("inf"), 0.0, new_maximum)',
        "shift = new_maximum",
        cross_entropy(CrossEntropyCase((3, 8, 4200), FP32, ignored=0.0, forbidden=4100)),
    ),
    "classes past the vocabulary count": (
        "cross_entropy",
        "cross_entropy.py",
        'logits = tl.where(inside, _capped(logits, softcap), -float("inf"))',
        "logits = _capped(logits, softcap)",
        cross_entropy(LOSS),
    ),
    "smoothing is left out of the target's gradient": (
        "cross_entropy",
        "cross_entropy.py",
        "gradient = tl.where(start + columns == target, gradient - hit, gradient)",
        "gradient = tl.where(start + columns == target, gradient - 1.0, gradient)",
        cross_entropy(CrossEntropyCase((7, 16, 50), FP32, label_smoothing=0.1)),
    ),
    "the slope of the softcap is left out": (
        "cross_entropy",
        "cross_entropy.py",
        "gradient *= 1.0 - bounded * bounded",
        "gradient *= 1.0",
        cross_entropy(CrossEntropyCase((7, 16, 50), FP32, softcap=2.0)),
    ),
    "the z-loss is not squared": (
        "cross_entropy",
        "cross_entropy.py",
        "loss += z_loss * lse * lse",
        "loss += z_loss * lse",
        cross_entropy(Z_LOSS),
    ),
    "the gradient of the z-loss lacks its factor of two": (
        "cross_entropy",
        "cross_entropy.py",
        "lse_slope += 2.0 * z_loss * lse",
        "lse_slope += z_loss * lse",
        cross_entropy(Z_LOSS),
    ),
    "every row gets the first one's upstream gradient": (
        "cross_entropy",
        "cross_entropy.py",
        "(row if UPSTREAM_PER_ROW else 0)",
        "0",
        cross_entropy(CrossEntropyCase((7, 16, 50), FP32, "none", fused=False)),
    ),
    "ignored rows keep their logits for a gradient": (
        "cross_entropy",
        "cross_entropy.py",
        "nothing, mask=start + columns < VOCAB)",
        "nothing, mask=start + columns < 0)",
        cross_entropy(CrossEntropyCase((7, 16, 50), FP32, captured=True)),
    ),
    "the weight gradient of the loss keeps its last chunk only": (
        "cross_entropy",
        "cross_entropy.py",
        "dweight if self.dweight is None else self.dweight.float().add_(dweight)",
        "dweight",
        cross_entropy(CrossEntropyCase((7, 16, 50), FP32, chunked=True)),
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
    {
        "feed_forward": [feed_forward(EPILOGUE), feed_forward(RESIDENT)],
        "cross_entropy": [cross_entropy(LOSS), cross_entropy(Z_LOSS), cross_entropy(LONG_LOSS)],
    }.items(),
)
def test_the_copy_without_a_bug_passes(module, checks, tmp_path):
    """Else the tests above would pass for any reason at all."""
    text = "import torch\n"
    with planted_kernels(tmp_path, module, f"{module}.py", text, text) as kernels:
        for check in checks:
            check(kernels)
