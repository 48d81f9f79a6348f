"""The parts that the models share; all work on packed tokens (T, width)."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..nn import AddLayerNorm, FeedForward
from ..ops.varlen_attention import varlen_attention
from .config import ModelConfig


class Sequences(NamedTuple):
    """Where the packed sequences begin, (N + 1,) int32, and the length of the longest."""

    cu_seqlens: Tensor
    max_seqlen: int


def sinusoidal_positions(length: int, width: int) -> Tensor:
    """Return the table (length, width) of fixed position encodings, float32.

    Source: Vaswani et al., "Attention Is All You Need", 2017, section 3.5.
    """
    rate = torch.exp(torch.arange(0, width, 2) * (-math.log(10000.0) / width))  # (width / 2,)
    angle = torch.arange(length)[:, None] * rate  # (length, width / 2)
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)


class Embedding(nn.Module):
    """Token embeddings scaled by the square root of the width, plus positions, with dropout."""

    positions: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.width)
        nn.init.normal_(self.tokens.weight, std=config.width**-0.5)
        self.dropout = nn.Dropout(config.dropout)
        table = sinusoidal_positions(config.max_length, config.width)
        self.register_buffer("positions", table, persistent=False)

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """Return the embeddings (T, width) of `input_ids` (T,) at `positions` (T,)."""
        scaled = self.tokens(input_ids) * self.tokens.embedding_dim**0.5
        return self.dropout(scaled + self.positions[positions].to(scaled.dtype))


class SelfAttention(nn.Module):
    """Multi-head attention within each packed sequence."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.dropout = config.heads, config.dropout
        self.in_proj = nn.Linear(config.width, 3 * config.width)
        self.out_proj = nn.Linear(config.width, config.width)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values of `x` (..., width), each (..., heads, head_dim)."""
        q, k, v = self.in_proj(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        return q, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, where: Sequences, causal: bool) -> Tensor:
        """Return the output (T, width) of projected tokens (T, heads, head_dim)."""
        out = varlen_attention(
            q,
            k,
            v,
            where.cu_seqlens,
            where.cu_seqlens,
            where.max_seqlen,
            where.max_seqlen,
            causal=causal,
            dropout_p=self.dropout if self.training else 0.0,
        )
        return self.out_proj(out.flatten(1))

    def forward(self, x: Tensor, where: Sequences, causal: bool) -> Tensor:
        """Return the attention of `x` (T, width) to itself."""
        return self.attend(*self.project(x), where, causal)


class SelfAttentionBlock(nn.Module):
    """Self-attention and a feed-forward part, each with residual and post-LN.

    Source: Vaswani et al., "Attention Is All You Need", 2017, figure 1.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention = SelfAttention(config)
        self.attention_norm = AddLayerNorm(config.width, dropout=config.dropout)
        self.feed_forward = FeedForward(
            config.width, config.hidden, activation=config.activation, dropout=config.dropout
        )
        self.feed_forward_norm = AddLayerNorm(config.width, dropout=config.dropout)

    def finish(self, attended: Tensor, x: Tensor) -> Tensor:
        """Return the block's output from what attention gave for `x`."""
        x = self.attention_norm(attended, x)
        return self.feed_forward_norm(self.feed_forward(x), x)

    def forward(self, x: Tensor, where: Sequences, causal: bool) -> Tensor:
        """Return the block's output (T, width)."""
        return self.finish(self.attention(x, where, causal), x)
