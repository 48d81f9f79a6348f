"""`torch.nn.TransformerDecoderLayer` and `TransformerDecoder` on the fused ops."""

from typing import Any

import torch
from torch import Tensor

from .attention import MultiheadAttention
from .replacement import replace_classes
from .sublayers import add_norm, feed_forward_part, is_causal_mask


class TransformerDecoderLayer(torch.nn.TransformerDecoderLayer):
    """A decoder layer with constructor, weights and call of `torch.nn.TransformerDecoderLayer`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        replace_classes(self, {torch.nn.MultiheadAttention: MultiheadAttention})

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """Return the layer's output; shapes as in `torch.nn.TransformerDecoderLayer.forward`."""

        def attend(x: Tensor) -> Tensor:
            return self.self_attn(
                x,
                x,
                x,
                attn_mask=tgt_mask,
                key_padding_mask=tgt_key_padding_mask,
                need_weights=False,
                is_causal=tgt_is_causal,
            )[0]

        def look_up(x: Tensor) -> Tensor:
            return self.multihead_attn(
                x,
                memory,
                memory,
                attn_mask=memory_mask,
                key_padding_mask=memory_key_padding_mask,
                need_weights=False,
                is_causal=memory_is_causal,
            )[0]

        x = tgt
        if self.norm_first:
            x = x + self.dropout1(attend(self.norm1(x)))
            x = x + self.dropout2(look_up(self.norm2(x)))
            return x + self.dropout3(feed_forward_part(self, self.norm3(x)))
        x = add_norm(attend(x), x, self.norm1, self.dropout1)
        x = add_norm(look_up(x), x, self.norm2, self.dropout2)
        return add_norm(feed_forward_part(self, x), x, self.norm3, self.dropout3)


class TransformerDecoder(torch.nn.TransformerDecoder):
    """A stack of decoder layers with the interface of `torch.nn.TransformerDecoder`."""

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """Return the stack's output; shapes as in `torch.nn.TransformerDecoder.forward`."""
        first = self.layers[0].self_attn
        length = tgt.shape[1 if tgt.dim() == 3 and first.batch_first else 0]
        causal = is_causal_mask(tgt_mask, tgt_is_causal, length)
        for layer in self.layers:
            tgt = layer(
                tgt,
                memory,
                tgt_mask=tgt_mask,
                memory_mask=memory_mask,
                tgt_key_padding_mask=tgt_key_padding_mask,
                memory_key_padding_mask=memory_key_padding_mask,
                tgt_is_causal=causal,
                memory_is_causal=memory_is_causal,
            )
        return tgt if self.norm is None else self.norm(tgt)
