"""The Transformer encoder: `torch.nn`'s layer and stack on the fused ops."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import adopt, is_standard_causal
from .feed_forward import layer_feed_forward
from .nested import nested_like, padded
from .norm import add_and_norm
from .parts import leaf, runs


class TransformerEncoderLayer(torch.nn.TransformerEncoderLayer):
    """Self-attention and feed-forward, with the arguments and `state_dict` of `torch.nn`.

    Post-LN layers add, drop out and normalise in one op. A feed-forward part whose activation the
    fused op does not know runs as plain PyTorch.

    Source: Vaswani et al., "Attention Is All You Need", 2017.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            d_model,
            nhead,
            dim_feedforward,
            dropout,
            activation,
            layer_norm_eps,
            batch_first,
            norm_first,
            bias,
            device,
            dtype,
        )
        adopt(self.self_attn)

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Return the layer's output, shaped like `src`; arguments as in `torch.nn`.

        `is_causal` promises that `src_mask` is the causal mask, which then need not be given.
        """
        if type(src) is torch.fx.Proxy:
            return leaf(self, src, src_mask, src_key_padding_mask, is_causal)
        if src.is_nested:
            if src.numel() == 0:
                return src
            dense, padding = padded(src)
            return nested_like(self.forward(dense, src_mask, padding, is_causal), src)
        if self.norm_first:
            x = src + self._sa_block(self.norm1(src), src_mask, src_key_padding_mask, is_causal)
            return x + self._ff_block(self.norm2(x))
        # A block that was replaced takes its dropout with it.
        if runs(self, "_sa_block", TransformerEncoderLayer):
            attended = self._attend(src, src_mask, src_key_padding_mask, is_causal)
            x = add_and_norm(self.norm1, attended, src, self.dropout1)
        else:
            attended = self._sa_block(src, src_mask, src_key_padding_mask, is_causal)
            x = self.norm1(src + attended)
        if runs(self, "_ff_block", TransformerEncoderLayer):
            return add_and_norm(self.norm2, layer_feed_forward(self, x), x, self.dropout2)
        return self.norm2(x + self._ff_block(x))

    def _sa_block(
        self,
        x: Tensor,
        attn_mask: Tensor | None,
        key_padding_mask: Tensor | None,
        is_causal: bool = False,
    ) -> Tensor:
        return self.dropout1(self._attend(x, attn_mask, key_padding_mask, is_causal))

    def _ff_block(self, x: Tensor) -> Tensor:
        return self.dropout2(layer_feed_forward(self, x))

    def _attend(
        self, x: Tensor, mask: Tensor | None, padding: Tensor | None, is_causal: bool
    ) -> Tensor:
        return self.self_attn(
            x,
            x,
            x,
            attn_mask=mask,
            key_padding_mask=padding,
            need_weights=False,
            is_causal=is_causal,
        )[0]


class TransformerEncoder(torch.nn.TransformerEncoder):
    """A stack of encoder layers, with the arguments and `state_dict` of `torch.nn`.

    `enable_nested_tensor` and `mask_check` are accepted and have no effect: padding is skipped
    inside the kernel, in training too, and the output keeps its shape.
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
        self.enable_nested_tensor = enable_nested_tensor

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """Return the output of the last layer, shaped like `src`; arguments as in `torch.nn`.

        Without `is_causal`, the standard causal mask is recognised and handed to the kernel. To
        look at a mask waits for the device; with `is_causal` True or False nothing does.
        """
        if type(src) is torch.fx.Proxy:
            return leaf(self, src, mask, src_key_padding_mask, is_causal)
        if mask is not None and is_causal is None:
            is_causal = is_standard_causal(mask)
        output = src
        for layer in self.layers:
            output = layer(
                output,
                src_mask=mask,
                src_key_padding_mask=src_key_padding_mask,
                is_causal=bool(is_causal),
            )
        return output if self.norm is None else self.norm(output)
