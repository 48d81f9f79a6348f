"""The Transformer decoder: `torch.nn`'s layer and stack on the fused ops."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import adopt, is_standard_causal
from .feed_forward import layer_feed_forward
from .norm import add_and_norm
from .parts import leaf, runs


class TransformerDecoderLayer(torch.nn.TransformerDecoderLayer):
    """Self-attention, cross-attention and feed-forward, as in `torch.nn`.

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
        if type(tgt) is torch.fx.Proxy:
            return leaf(
                self,
                tgt,
                memory,
                tgt_mask,
                memory_mask,
                tgt_key_padding_mask,
                memory_key_padding_mask,
                tgt_is_causal,
                memory_is_causal,
            )

        own = (tgt_mask, tgt_key_padding_mask, tgt_is_causal)
        cross = (memory_mask, memory_key_padding_mask, memory_is_causal)
        if self.norm_first:
            x = tgt + self._sa_block(self.norm1(tgt), *own)
            x = x + self._mha_block(self.norm2(x), memory, *cross)
            return x + self._ff_block(self.norm3(x))
        # A block that was replaced takes its dropout with it.
        if runs(self, "_sa_block", TransformerDecoderLayer):
            attended = _attend(self.self_attn, tgt, tgt, *own)
            x = add_and_norm(self.norm1, attended, tgt, self.dropout1)
        else:
            x = self.norm1(tgt + self._sa_block(tgt, *own))
        if runs(self, "_mha_block", TransformerDecoderLayer):
            attended = _attend(self.multihead_attn, x, memory, *cross)
            x = add_and_norm(self.norm2, attended, x, self.dropout2)
        else:
            x = self.norm2(x + self._mha_block(x, memory, *cross))
        if runs(self, "_ff_block", TransformerDecoderLayer):
            return add_and_norm(self.norm3, layer_feed_forward(self, x), x, self.dropout3)
        return self.norm3(x + self._ff_block(x))

    def _sa_block(
        self,
        x: Tensor,
        attn_mask: Tensor | None,
        key_padding_mask: Tensor | None,
        is_causal: bool = False,
    ) -> Tensor:
        attended = _attend(self.self_attn, x, x, attn_mask, key_padding_mask, is_causal)
        return self.dropout1(attended)

    def _mha_block(
        self,
        x: Tensor,
        mem: Tensor,
        attn_mask: Tensor | None,
        key_padding_mask: Tensor | None,
        is_causal: bool = False,
    ) -> Tensor:
        attended = _attend(self.multihead_attn, x, mem, attn_mask, key_padding_mask, is_causal)
        return self.dropout2(attended)

    def _ff_block(self, x: Tensor) -> Tensor:
        return self.dropout3(layer_feed_forward(self, x))


def _attend(
    attention: torch.nn.Module,
    x: Tensor,
    memory: Tensor,
    mask: Tensor | None,
    padding: Tensor | None,
    is_causal: bool,
) -> Tensor:
    return attention(
        x,
        memory,
        memory,
        attn_mask=mask,
        key_padding_mask=padding,
        need_weights=False,
        is_causal=is_causal,
    )[0]


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

        Without `tgt_is_causal`, the standard causal mask is recognised and handed to the kernel. To
        look at a mask waits for the device; with `tgt_is_causal` True or False nothing does.
        """
        if type(tgt) is torch.fx.Proxy:
            return leaf(
                self,
                tgt,
                memory,
                tgt_mask,
                memory_mask,
                tgt_key_padding_mask,
                memory_key_padding_mask,
                tgt_is_causal,
                memory_is_causal,
            )
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
