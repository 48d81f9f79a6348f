"""The whole encoder-decoder: `torch.nn.Transformer` on the fused ops."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .decoder import TransformerDecoder, TransformerDecoderLayer
from .encoder import TransformerEncoder, TransformerEncoderLayer


class Transformer(torch.nn.Transformer):
    """An encoder-decoder with the arguments, call and `state_dict` of `torch.nn.Transformer`.

    The same seed gives the same weights as there. Masks, shapes and errors are those of
    `torch.nn.Transformer.forward`, which hands the work to this package's encoder and decoder.

    Source: Vaswani et al., "Attention Is All You Need", 2017.
    """

    def __init__(
        self,
        d_model: int = 512,
        nhead: int = 8,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        custom_encoder: Any | None = None,
        custom_decoder: Any | None = None,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        # torch.nn.Transformer's own constructor would build its own layers: start below it.
        torch.nn.Module.__init__(self)
        place = {"device": device, "dtype": dtype}
        sizes = (d_model, nhead, dim_feedforward, dropout, activation)
        manner = (layer_norm_eps, batch_first, norm_first, bias)
        norm = {"eps": layer_norm_eps, "bias": bias, **place}
        if custom_encoder is not None:
            self.encoder = custom_encoder
        else:
            encoder_layer = TransformerEncoderLayer(*sizes, *manner, **place)
            encoder_norm = torch.nn.LayerNorm(d_model, **norm)
            self.encoder = TransformerEncoder(encoder_layer, num_encoder_layers, encoder_norm)
        if custom_decoder is not None:
            self.decoder = custom_decoder
        else:
            decoder_layer = TransformerDecoderLayer(*sizes, *manner, **place)
            decoder_norm = torch.nn.LayerNorm(d_model, **norm)
            self.decoder = TransformerDecoder(decoder_layer, num_decoder_layers, decoder_norm)
        self._reset_parameters()
        self.d_model, self.nhead, self.batch_first = d_model, nhead, batch_first
