"""`torch.nn.TransformerEncoderLayer` and `TransformerEncoder` on the fused ops."""

from typing import Any

import torch
from torch import Tensor

from .attention import MultiheadAttention
from .replacement import replace_classes
from .sublayers import add_norm, feed_forward_part, is_causal_mask


class TransformerEncoderLayer(torch.nn.TransformerEncoderLayer):
    """An encoder layer with constructor, weights and call of `torch.nn.TransformerEncoderLayer`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        replace_classes(self, {torch.nn.MultiheadAttention: MultiheadAttention})

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Return the layer's output; shapes as in `torch.nn.TransformerEncoderLayer.forward`."""

        def attend(x: Tensor) -> Tensor:
            return self.self_attn(
                x,
                x,
                x,
                attn_mask=src_mask,
                key_padding_mask=src_key_padding_mask,
                need_weights=False,
                is_causal=is_causal,
            )[0]

        x = src
        if self.norm_first:
            x = x + self.dropout1(attend(self.norm1(x)))
            return x + self.dropout2(feed_forward_part(self, self.norm2(x)))
        x = add_norm(attend(x), x, self.norm1, self.dropout1)
        return add_norm(feed_forward_part(self, x), x, self.norm2, self.dropout2)


class TransformerEncoder(torch.nn.TransformerEncoder):
    """A stack of encoder layers with the interface of `torch.nn.TransformerEncoder`.

    `enable_nested_tensor` is accepted and without effect: padding is skipped inside the kernels.
    """

    def __init__(
        self,
        encoder_layer: torch.nn.TransformerEncoderLayer,
        num_layers: int,
        norm: torch.nn.Module | None = None,
        enable_nested_tensor: bool = True,
        mask_check: bool = True,
    ) -> None:
        super().__init__(encoder_layer, num_layers, norm, False, mask_check)

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """Return the stack's output; shapes as in `torch.nn.TransformerEncoder.forward`."""
        first = self.layers[0].self_attn
        length = src.shape[1 if src.dim() == 3 and first.batch_first else 0]
        causal = is_causal_mask(mask, is_causal, length)
        for layer in self.layers:
            src = layer(
                src, src_mask=mask, src_key_padding_mask=src_key_padding_mask, is_causal=causal
            )
        return src if self.norm is None else self.norm(src)
