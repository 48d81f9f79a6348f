"""The Transformer decoder: `torch.nn`'s layer and stack on the fused ops."""

from typing import Any

import torch
from torch import Tensor

from .attention import adopt, is_standard_causal
from .feed_forward import layer_feed_forward
from .norm import add_and_norm


class TransformerDecoderLayer(torch.nn.TransformerDecoderLayer):
    """Self-attention, cross-attention and feed-forward, as in `torch.nn`.

    Post-LN layers add, drop out and normalise in one op. A feed-forward part whose activation the
    fused op does not know runs as plain PyTorch.

    Source: Vaswani et al., "Attention Is All You Need", 2017.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        adopt(self.self_attn)
        adopt(self.multihead_attn)

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
        """Return the layer's output, shaped like `tgt`; arguments as in `torch.nn`."""

        def attend_self(x: Tensor) -> Tensor:
            return self.self_attn(
                x,
                x,
                x,
                attn_mask=tgt_mask,
                key_padding_mask=tgt_key_padding_mask,
                need_weights=False,
                is_causal=tgt_is_causal,
            )[0]

        def attend_memory(x: Tensor) -> Tensor:
            return self.multihead_attn(
                x,
                memory,
                memory,
                attn_mask=memory_mask,
                key_padding_mask=memory_key_padding_mask,
                need_weights=False,
                is_causal=memory_is_causal,
            )[0]

        if self.norm_first:
            x = tgt + self.dropout1(attend_self(self.norm1(tgt)))
            x = x + self.dropout2(attend_memory(self.norm2(x)))
            return x + self.dropout3(layer_feed_forward(self, self.norm3(x)))
        x = add_and_norm(self.norm1, attend_self(tgt), tgt, self.dropout1)
        x = add_and_norm(self.norm2, attend_memory(x), x, self.dropout2)
        return add_and_norm(self.norm3, layer_feed_forward(self, x), x, self.dropout3)


class TransformerDecoder(torch.nn.TransformerDecoder):
    """A stack of decoder layers, with the arguments and `state_dict` of `torch.nn`."""

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
        """Return the output of the last layer, shaped like `tgt`; arguments as in `torch.nn`.

        Without `tgt_is_causal`, the standard causal mask is recognised and handed to the kernel.
        """
        if tgt_mask is not None and tgt_is_causal is None:
            tgt_is_causal = is_standard_causal(tgt_mask)
        output = tgt
        for layer in self.layers:
            output = layer(
                output,
                memory,
                tgt_mask=tgt_mask,
                memory_mask=memory_mask,
                tgt_key_padding_mask=tgt_key_padding_mask,
                memory_key_padding_mask=memory_key_padding_mask,
                tgt_is_causal=bool(tgt_is_causal),
                memory_is_causal=memory_is_causal,
            )
        return output if self.norm is None else self.norm(output)
