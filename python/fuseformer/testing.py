"""The one error rule that every test and benchmark of the package judges results by."""

import torch
from torch import Tensor

ABSOLUTE_SLACK = 1e-5


def assert_close_to_reference(
    actual: Tensor,
    reference: Tensor,
    low_precision: Tensor,
    *,
    factor: float = 2.0,
    name: str = "result",
) -> None:
    """Fail unless `actual` errs at most `factor` times as much as plain PyTorch in its precision.

    `actual`, `reference` and `low_precision` have one shape. `reference` is the float32 or float64
    result; `low_precision` is what plain PyTorch gives when the same maths runs in the dtype under
    test. The bound on ``max|actual - reference|`` is ``factor * max|low_precision - reference|``
    plus 1e-5; use a factor of 2 for outputs and 3 for gradients. Where the reference is infinite,
    `actual` must hold the same infinity. Raises `AssertionError` with both errors, and where
    `actual` has a NaN or an infinity that the reference lacks.
    """
    if actual.shape != reference.shape or low_precision.shape != reference.shape:
        raise AssertionError(
            f"{name}: shapes differ: actual {tuple(actual.shape)}, reference "
            f"{tuple(reference.shape)}, low precision {tuple(low_precision.shape)}"
        )
    if reference.numel() == 0:
        return
    actual64, reference64, low64 = (
        t.detach().to("cpu", torch.float64) for t in (actual, reference, low_precision)
    )
    finite = reference64.isfinite()
    unequal = ~finite & (actual64 != reference64) & ~(actual64.isnan() & reference64.isnan())
    if unequal.any():
        raise AssertionError(f"{name}: {int(unequal.sum())} infinite positions differ")
    broken = finite & ~actual64.isfinite()
    if broken.any():
        raise AssertionError(
            f"{name}: {int(broken.sum())} of {broken.numel()} values are NaN or infinite where the "
            f"reference is finite, first at {broken.nonzero()[0].tolist()}"
        )
    if not finite.any():
        return
    error = (actual64 - reference64)[finite].abs()
    allowed = (low64 - reference64)[finite].abs().nan_to_num(nan=0.0, posinf=0.0).max().item()
    bound = factor * allowed + ABSOLUTE_SLACK
    if error.max().item() > bound:
        raise AssertionError(
            f"{name}: error {error.max().item():.3e} exceeds {bound:.3e} "
            f"({factor:g} x the low-precision error {allowed:.3e} + {ABSOLUTE_SLACK:g})"
        )
