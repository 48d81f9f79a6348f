"""Drop-in modules: the constructors, calls and `state_dict` of `torch.nn`, on the fused ops.

What `torch.nn` would have run with the same parts, runs: parts that were replaced, subclassed,
hooked or parametrised are called, the others fused. Not served: `torch.jit.script`, which PyTorch
has deprecated, and what looks into the private fast path of `torch.nn`, which is not taken here;
on the CPU under autocast that path rounds results to half precision, these modules do not.
`torch.fx.symbolic_trace` sees each module as one node, but cannot trace one as its root.
"""

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
