"""The activation functions of feed-forward kernels, with their derivatives."""

import triton
import triton.language as tl

SQRT_HALF = tl.constexpr(0.7071067811865476)
INVERSE_SQRT_TWO_PI = tl.constexpr(0.3989422804014327)
TWICE_SQRT_TWO_OVER_PI = tl.constexpr(1.5957691216057308)
GELU_CUBIC = tl.constexpr(0.044715)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """Return the activation of `x` (any shape, float32) and its derivative.

    A caller that drops the derivative pays nothing for it. The tanh form of GELU is written with
    ``(1 + tanh(u)) / 2 = sigmoid(2 u)``.

    Source: Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016; Elfwing et al.,
    "Sigmoid-Weighted Linear Units", 2017.
    """
    if ACTIVATION == "relu":
        y = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
        slope = tl.where(x > 0.0, 1.0, 0.0)
    elif ACTIVATION == "gelu":
        below = 0.5 + 0.5 * tl.erf(x * SQRT_HALF)
        y = x * below
        slope = below + x * INVERSE_SQRT_TWO_PI * tl.exp(-0.5 * x * x)
    elif ACTIVATION == "gelu_tanh":
        square = x * x
        gate = _sigmoid(TWICE_SQRT_TWO_OVER_PI * x * (1.0 + GELU_CUBIC * square))
        y = x * gate
        inner = TWICE_SQRT_TWO_OVER_PI * (1.0 + 3.0 * GELU_CUBIC * square)
        slope = gate + y * (1.0 - gate) * inner
    else:
        tl.static_assert(ACTIVATION == "silu", "unknown activation")
        gate = _sigmoid(x)
        y = x * gate
        slope = gate + y * (1.0 - gate)
    return y, slope
