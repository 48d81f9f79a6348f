"""Fused attention and feed-forward kernels for PyTorch Transformers."""

from . import nn
from ._version import __version__
from .backends import explain, use_backend
from .ops.attention import attention
from .ops.attention_weights import attention_weights
from .ops.counting import register_when_needed
from .ops.cross_entropy import linear_cross_entropy
from .ops.decode_attention import decode_attention
from .ops.feed_forward import feed_forward, gated_feed_forward
from .ops.norm import add_layer_norm, add_rms_norm
from .ops.rotary import rotary
from .ops.varlen_attention import varlen_attention

register_when_needed()

__all__ = [
    "__version__",
    "add_layer_norm",
    "add_rms_norm",
    "attention",
    "attention_weights",
    "decode_attention",
    "explain",
    "feed_forward",
    "gated_feed_forward",
    "linear_cross_entropy",
    "nn",
    "rotary",
    "use_backend",
    "varlen_attention",
]
