"""The parts that the models share; all work on packed tokens (T, width)."""

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from ..nn import AddLayerNorm, FeedForward
from ..ops.attention import attention
from ..ops.varlen_attention import varlen_attention
from .cache import Cache, Memory
from .config import ModelConfig
from .sequences import Sequences


def sinusoidal_positions(length: int, width: int) -> Tensor:
    """Return the table (length, width) of fixed position encodings, float32.

    Source: Vaswani et al., "Attention Is All You Need", 2017, section 3.5.
    """
    rate = torch.exp(torch.arange(0, width, 2) * (-math.log(10000.0) / width))  # (width / 2,)
    angle = torch.arange(length)[:, None] * rate  # (length, width / 2)
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)


class Embedding(nn.Module):
    """Token embeddings scaled by the square root of the width, plus positions, with dropout.

    Source: Vaswani et al., "Attention Is All You Need", 2017, sections 3.4 and 3.5.
    """

    positions: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.width)
        nn.init.normal_(self.tokens.weight, std=config.width**-0.5)
        self.dropout = nn.Dropout(config.dropout)
        self.max_length = config.max_length
        self.fill_positions()

    def fill_positions(self) -> None:
        """Compute the table of positions, which checkpoints do not hold."""
        table = sinusoidal_positions(self.max_length, self.tokens.embedding_dim)
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
        dropout_p = self.dropout if self.training else 0.0
        out = varlen_attention(
            q,
            k,
            v,
            where.cu_seqlens,
            where.cu_seqlens,
            where.max_seqlen,
            where.max_seqlen,
            causal=causal,
            dropout_p=dropout_p,
        )
        return self.out_proj(out.flatten(1))

    def forward(self, x: Tensor, where: Sequences, causal: bool) -> Tensor:
        """Return the attention of `x` (T, width) to itself."""
        return self.attend(*self.project(x), where, causal)

    def prefill(self, x: Tensor, where: Sequences, cache: Cache) -> Tensor:
        """Return the causal attention of prompts `x` (T, width); cache their keys and values."""
        q, k, v = self.project(x)
        cache.fill(k, v, where)
        return self.attend(q, k, v, where, True)

    def step(self, x: Tensor, cache: Cache, layer: int) -> Tensor:
        """Return the attention (N, width) of one new token a sequence to all before and itself."""
        q, k, v = self.project(x)
        keys, values = cache.append(layer, k, v)
        out = attention(q[:, :, None], keys, values, key_lengths=cache.lengths + 1)
        return self.out_proj(out.flatten(1))  # from (N, heads, 1, head_dim)


class CrossAttention(nn.Module):
    """Multi-head attention of each packed sequence to the source sequence of the same number."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.dropout = config.heads, config.dropout
        self.q_proj = nn.Linear(config.width, config.width)
        self.kv_proj = nn.Linear(config.width, 2 * config.width)
        self.out_proj = nn.Linear(config.width, config.width)

    def project_memory(self, memory: Tensor, where: Sequences) -> Memory:
        """Return the keys and values of the encoder's output `memory` (S, width)."""
        k, v = self.kv_proj(memory).unflatten(-1, (2, self.heads, -1)).unbind(-3)
        return Memory(k, v, where)

    def forward(self, x: Tensor, where: Sequences, memory: Memory) -> Tensor:
        """Return the attention (T, width) of `x` (T, width) to the source; 0 to an empty one."""
        dropout_p = self.dropout if self.training else 0.0
        out = varlen_attention(
            self.q_proj(x).unflatten(-1, (self.heads, -1)),
            memory.keys,
            memory.values,
            where.cu_seqlens,
            memory.where.cu_seqlens,
            where.max_seqlen,
            memory.where.max_seqlen,
            dropout_p=dropout_p,
        )
        return self.out_proj(out.flatten(1))


class Block(nn.Module):
    """Self-attention, with `cross` attention to a source, and a feed-forward part, all post-LN.

    Source: Vaswani et al., "Attention Is All You Need", 2017, figure 1.
    """

    def __init__(self, config: ModelConfig, cross: bool = False) -> None:
        super().__init__()
        self.attention = SelfAttention(config)
        self.attention_norm = AddLayerNorm(config.width, dropout=config.dropout)
        self.cross_attention = CrossAttention(config) if cross else None
        if cross:
            self.cross_attention_norm = AddLayerNorm(config.width, dropout=config.dropout)
        self.feed_forward = FeedForward(
            config.width, config.hidden, activation=config.activation, dropout=config.dropout
        )
        self.feed_forward_norm = AddLayerNorm(config.width, dropout=config.dropout)

    def forward(
        self, x: Tensor, where: Sequences, causal: bool, memory: Memory | None = None
    ) -> Tensor:
        """Return the block's output (T, width)."""
        return self._finish(self.attention(x, where, causal), x, where, memory)

    def prefill(self, x: Tensor, where: Sequences, cache: Cache, layer: int) -> Tensor:
        """Return the output (T, width) for causal prompts `x`, and cache what later tokens read."""
        attended = self.attention.prefill(x, where, cache)
        return self._finish(attended, x, where, cache.memory(layer))

    def step(self, x: Tensor, cache: Cache, layer: int) -> Tensor:
        """Return the output (N, width) for one new token `x` (N, width) of each sequence."""
        attended = self.attention.step(x, cache, layer)
        return self._finish(attended, x, cache.single, cache.memory(layer))

    def _finish(
        self, attended: Tensor, x: Tensor, where: Sequences, memory: Memory | None
    ) -> Tensor:
        x = self.attention_norm(attended, x)
        if self.cross_attention is not None:
            x = self.cross_attention_norm(self.cross_attention(x, where, memory), x)
        return self.feed_forward_norm(self.feed_forward(x), x)


class Stack(nn.ModuleList):
    """The `config.layers` blocks of an encoder or decoder, one after another."""

    def __init__(self, config: ModelConfig, cross: bool = False) -> None:
        super().__init__(Block(config, cross) for _ in range(config.layers))

    def blocks(self) -> list[Block]:
        """Return the blocks under their own type."""
        return cast(list[Block], list(self))

    def project_memory(self, memory: Tensor, where: Sequences) -> list[Memory]:
        """Return what each block reads of the encoder's output `memory` (S, width)."""
        crossings = [block.cross_attention for block in self.blocks()]
        return [c.project_memory(memory, where) for c in crossings if c is not None]

    def forward(
        self, x: Tensor, where: Sequences, causal: bool, memories: Sequence[Memory] | None = None
    ) -> Tensor:
        """Return the last block's output (T, width)."""
        for layer, block in enumerate(self.blocks()):
            x = block(x, where, causal, None if memories is None else memories[layer])
        return x

    def prefill(self, x: Tensor, where: Sequences, cache: Cache) -> Tensor:
        """Return the output (T, width) for causal prompts `x` (T, width), and fill the cache."""
        for layer, block in enumerate(self.blocks()):
            x = block.prefill(x, where, cache, layer)
        return x

    def step(self, x: Tensor, cache: Cache) -> Tensor:
        """Return the output (N, width) for one new token of each sequence, and remember it."""
        for layer, block in enumerate(self.blocks()):
            x = block.step(x, cache, layer)
        cache.advance()
        return x
