"""Drop-in modules: those of `torch.nn` for Transformers, and the parts they are made of."""

from .attention import MultiheadAttention
from .blocks import AddLayerNorm, AddRMSNorm, FeedForward, GatedFeedForward, LinearCrossEntropy
from .decoder import TransformerDecoder, TransformerDecoderLayer
from .encoder import TransformerEncoder, TransformerEncoderLayer
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
