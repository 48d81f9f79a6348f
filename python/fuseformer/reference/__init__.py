"""Every op in plain, differentiable PyTorch: the tests' oracle and the last resort.

Nothing here is fast, and logits exist in full. Softmax and sums run in float32 for half-precision
inputs, as in every backend; float64 stays float64, so that `torch.autograd.gradcheck` applies.
"""

from .attending import (
    add_bias_and_masks,
    attention,
    bias_of_sequence,
    cached_rows,
    capped_logits,
    decode_attention,
    diagonal_offset,
    repeat_heads,
    softmax_with_lse,
    varlen_attention,
    visible,
    without_padding,
)
from .blocks import (
    add_norm,
    feed_forward,
    gated_feed_forward,
    linear_cross_entropy,
    rotary,
    rotate,
    rotated_parts,
)
from .numerics import (
    ACTIVATIONS,
    apply_activation,
    dropout,
    widened,
)

__all__ = [
    "ACTIVATIONS",
    "add_bias_and_masks",
    "add_norm",
    "apply_activation",
    "attention",
    "bias_of_sequence",
    "cached_rows",
    "capped_logits",
    "decode_attention",
    "diagonal_offset",
    "dropout",
    "feed_forward",
    "gated_feed_forward",
    "linear_cross_entropy",
    "repeat_heads",
    "rotary",
    "rotate",
    "rotated_parts",
    "softmax_with_lse",
    "varlen_attention",
    "visible",
    "widened",
    "without_padding",
]
