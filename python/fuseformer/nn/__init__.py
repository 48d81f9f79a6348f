"""Drop-in modules: the constructors, calls and `state_dict` of `torch.nn`, on the fused ops."""

from .attention import MultiheadAttention
from .decoder import TransformerDecoder, TransformerDecoderLayer
from .encoder import TransformerEncoder, TransformerEncoderLayer
from .feed_forward import FeedForward, GatedFeedForward
from .loss import LinearCrossEntropy
from .norm import AddLayerNorm, AddRMSNorm
from .transformer import Transformer

__all__ = [
    "AddLayerNorm",
    "AddRMSNorm",
    "FeedForward",
    "GatedFeedForward",
    "LinearCrossEntropy",
    "MultiheadAttention",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
]
