"""A decoder-only language model of the reference blocks, with a cache for generation."""

from typing import cast

import torch
from torch import Tensor, nn

from ..ops.attention import attention
from ..ops.cross_entropy import linear_cross_entropy
from .blocks import Embedding, SelfAttentionBlock, Sequences
from .config import ModelConfig


class Cache:
    """Keys and values of past tokens, (N, heads, capacity, head_dim) a layer, and their number."""

    def __init__(self, config: ModelConfig, lengths: Tensor, capacity: int, like: Tensor) -> None:
        shape = (len(lengths), config.heads, capacity, config.width // config.heads)
        self.keys = [like.new_zeros(shape) for _ in range(config.layers)]
        self.values = [like.new_zeros(shape) for _ in range(config.layers)]
        self.lengths = lengths  # (N,) int32

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Store one new token's `k` and `v` (N, heads, head_dim) behind each sequence."""
        row = torch.arange(len(self.lengths), device=k.device)
        self.keys[layer][row, :, self.lengths.long()] = k
        self.values[layer][row, :, self.lengths.long()] = v


class CausalLM(nn.Module):
    """A language model whose output weights are its embeddings.

    Works on packed sequences: `input_ids` (T,) int64 with their `positions` (T,) and where each
    sequence begins. Raises `ValueError` for a sequence longer than `config.max_length`.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = Embedding(config)
        self.blocks = nn.ModuleList(SelfAttentionBlock(config) for _ in range(config.layers))

    def _blocks(self) -> list[SelfAttentionBlock]:
        return cast(list[SelfAttentionBlock], list(self.blocks))

    def _check_length(self, length: int) -> None:
        if length > self.config.max_length:
            raise ValueError(
                f"input_ids: got a sequence of {length} tokens, expected at most the model's "
                f"max_length {self.config.max_length}"
            )

    def forward(self, input_ids: Tensor, positions: Tensor, where: Sequences) -> Tensor:
        """Return the hidden states (T, width) behind each token."""
        self._check_length(where.max_seqlen)
        x = self.embedding(input_ids, positions)
        for block in self._blocks():
            x = block(x, where, True)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the scores (..., vocab_size) of the next token for `hidden` (..., width)."""
        return nn.functional.linear(hidden, self.embedding.tokens.weight)

    def loss(
        self,
        input_ids: Tensor,
        positions: Tensor,
        targets: Tensor,
        where: Sequences,
        reduction: str = "mean",
    ) -> Tensor:
        """Return the cross entropy of `targets` (T,), -100 where a token is not supervised."""
        hidden = self(input_ids, positions, where)
        return linear_cross_entropy(
            hidden, self.embedding.tokens.weight, targets, reduction=reduction
        )

    @torch.no_grad()
    def prefill(
        self, input_ids: Tensor, positions: Tensor, where: Sequences, new_tokens: int
    ) -> tuple[Tensor, Cache]:
        """Read prompts; return the last hidden states (N, width) and a cache for what follows.

        The cache has room for `new_tokens` more tokens a sequence. Every prompt has a token.
        """
        self._check_length(where.max_seqlen + new_tokens)
        lengths = where.cu_seqlens.diff()
        if (lengths < 1).any():
            raise ValueError("input_ids: got an empty prompt, expected at least one token in each")
        x = self.embedding(input_ids, positions)
        cache = Cache(self.config, lengths, where.max_seqlen + new_tokens, x)
        sequence = torch.repeat_interleave(
            torch.arange(len(lengths), device=x.device), lengths.long()
        )
        for index, block in enumerate(self._blocks()):
            q, k, v = block.attention.project(x)
            cache.keys[index][sequence, :, positions] = k
            cache.values[index][sequence, :, positions] = v
            x = block.finish(block.attention.attend(q, k, v, where, True), x)
        return x[where.cu_seqlens[1:].long() - 1], cache

    @torch.no_grad()
    def step(self, input_ids: Tensor, cache: Cache) -> Tensor:
        """Read one token a sequence (N,); return the hidden states (N, width) behind them."""
        x = self.embedding(input_ids, cache.lengths.long())
        for index, block in enumerate(self._blocks()):
            q, k, v = block.attention.project(x)
            cache.append(index, k, v)
            out = attention(
                q[:, :, None],
                cache.keys[index],
                cache.values[index],
                key_lengths=cache.lengths + 1,
            )  # (N, heads, 1, head_dim)
            x = block.finish(block.attention.out_proj(out.flatten(1)), x)
        cache.lengths = cache.lengths + 1
        return x
