"""The reference models from torch.nn's own parts, on padded batches: what users had before.

They have the same weights under torch.nn's names, so that the two can be compared in result, time
and memory.
"""

import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .causal_lm import CausalLM
from .encoder_decoder import EncoderDecoder

IGNORED = -100

_NAMES = (
    (r"^embedding\.tokens", "embedding"),
    (r"^blocks", "stack.layers"),
    (r"^(en|de)coder", r"stack.\1coder.layers"),
    (r"cross_attention\.out_proj", "multihead_attn.out_proj"),
    (r"cross_attention\.(q|kv)_proj\.", "multihead_attn.in_proj_"),
    (r"attention\.out_proj", "self_attn.out_proj"),
    (r"attention\.in_proj\.", "self_attn.in_proj_"),
    (r"(decoder.*)feed_forward_norm", r"\1norm3"),
    (r"cross_attention_norm|feed_forward_norm", "norm2"),
    (r"attention_norm", "norm1"),
    (r"feed_forward\.", ""),
)


def as_torch(ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the named weights of a reference model, or their gradients, as `PlainModel` has them.

    Projections that torch.nn keeps in one matrix are laid one behind the other.
    """
    parts: dict[str, list[Tensor]] = {}
    for name, tensor in ours.items():
        for pattern, replacement in _NAMES:
            name = re.sub(pattern, replacement, name)
        parts.setdefault(name, []).append(tensor)
    return {name: torch.cat(tensors) for name, tensors in parts.items()}


class PlainModel(nn.Module):
    """The twin of a `CausalLM` or `EncoderDecoder`: nn.Transformer, or its encoder made causal.

    It begins with the weights of `model`, its dtype and its device. There is no norm behind the
    stacks, which the paper has not either.
    """

    table: Tensor

    def __init__(self, model: CausalLM | EncoderDecoder) -> None:
        super().__init__()
        config = model.config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.register_buffer("table", model.embedding.positions.clone())
        sizes = (config.width, config.heads, config.hidden, config.dropout, config.activation)
        layer = nn.TransformerEncoderLayer(*sizes, batch_first=True)
        encoder = nn.TransformerEncoder(layer, config.layers, enable_nested_tensor=False)
        self.stack: nn.Module = encoder
        if isinstance(model, EncoderDecoder):
            decoder_layer = nn.TransformerDecoderLayer(*sizes, batch_first=True)
            decoder = nn.TransformerDecoder(decoder_layer, config.layers)
            self.stack = nn.Transformer(
                *sizes[:2], custom_encoder=encoder, custom_decoder=decoder, batch_first=True
            )
        weight = model.embedding.tokens.weight
        self.to(weight.device, weight.dtype)
        self.load_state_dict({**as_torch(model.state_dict()), "table": self.table})

    def _embed(self, ids: Tensor) -> Tensor:
        scaled = self.embedding(ids) * self.embedding.embedding_dim**0.5
        return self.dropout(scaled + self.table[: ids.shape[1]])

    def loss(
        self,
        ids: Tensor,
        targets: Tensor,
        padding: Tensor,
        source_ids: Tensor | None = None,
        source_padding: Tensor | None = None,
    ) -> Tensor:
        """Return the mean cross entropy of `targets` (B, S), -100 where one does not count.

        `padding` (B, S) bool is True where `ids` (B, S) are padding; the sources are alike.
        """
        length, x = ids.shape[1], self._embed(ids)
        causal = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        if source_ids is None:
            hidden = self.stack(x, causal, padding, is_causal=True)
        else:
            hidden = self.stack(
                self._embed(source_ids),
                x,
                tgt_mask=causal,
                src_key_padding_mask=source_padding,
                tgt_key_padding_mask=padding,
                memory_key_padding_mask=source_padding,
                tgt_is_causal=True,
            )
        logits = F.linear(hidden, self.embedding.weight).flatten(0, 1)
        return F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED)
