"""`torch.nn.Transformer` on the fused ops."""

from typing import Any

import torch

from .attention import MultiheadAttention
from .decoder import TransformerDecoder, TransformerDecoderLayer
from .encoder import TransformerEncoder, TransformerEncoderLayer
from .replacement import replace_classes

FUSED_CLASSES: dict[type, type] = {
    torch.nn.MultiheadAttention: MultiheadAttention,
    torch.nn.TransformerEncoderLayer: TransformerEncoderLayer,
    torch.nn.TransformerEncoder: TransformerEncoder,
    torch.nn.TransformerDecoderLayer: TransformerDecoderLayer,
    torch.nn.TransformerDecoder: TransformerDecoder,
}


class Transformer(torch.nn.Transformer):
    """The encoder-decoder with constructor, weights and call of `torch.nn.Transformer`.

    A custom encoder or decoder keeps its class, but modules of `torch.nn` inside it are replaced.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        replace_classes(self, FUSED_CLASSES)
