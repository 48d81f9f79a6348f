"""The Transformer of "Attention Is All You Need" on packed tokens."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .blocks import Stack
from .cache import Cache
from .config import ModelConfig
from .language_model import TokenModel
from .sequences import Sequences, pack_ids


class EncoderDecoder(TokenModel):
    """An encoder of sources and a causal decoder of targets that attends to them.

    Both have `config.layers` blocks, and share the embeddings, which are also the output weights.
    Sources and targets are packed, each with their own `Sequences` of the same number. Ids and
    positions are int64, `source_ids` and `source_positions` (S,), `input_ids` and `positions` (T,).
    Methods raise `ValueError` that names the argument.

    Source: Vaswani et al., "Attention Is All You Need", 2017.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.encoder = Stack(config)
        self.decoder = Stack(config, cross=True)

    def encode(
        self, source_ids: Tensor, source_positions: Tensor, source_where: Sequences
    ) -> Tensor:
        """Return the encoder's output (S, width)."""
        x = self.embed(source_ids, source_positions, source_where, "source")
        return self.encoder(x, source_where, False)

    def decode(
        self,
        memory: Tensor,
        source_where: Sequences,
        input_ids: Tensor,
        positions: Tensor,
        where: Sequences,
    ) -> Tensor:
        """Return the decoder's output (T, width), given the encoder's, `memory` (S, width)."""
        self._check_pairs(source_where, where)
        x = self.embed(input_ids, positions, where, "input")
        return self.decoder(x, where, True, self.decoder.project_memory(memory, source_where))

    def forward(
        self,
        source_ids: Tensor,
        source_positions: Tensor,
        source_where: Sequences,
        input_ids: Tensor,
        positions: Tensor,
        where: Sequences,
    ) -> Tensor:
        """Return the hidden states (T, width) behind each target token."""
        self._check_pairs(source_where, where)
        memory = self.encode(source_ids, source_positions, source_where)
        return self.decode(memory, source_where, input_ids, positions, where)

    def loss(
        self,
        source_ids: Tensor,
        source_positions: Tensor,
        source_where: Sequences,
        input_ids: Tensor,
        positions: Tensor,
        targets: Tensor,
        where: Sequences,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """Return the cross entropy of `targets` (T,), -100 where a token is not supervised.

        A float32 scalar for the reductions "mean" and "sum", (T,) for "none". `label_smoothing` is
        the share of the target that is spread over the vocabulary; the paper takes 0.1.
        """
        hidden = self(source_ids, source_positions, source_where, input_ids, positions, where)
        return self.token_loss(hidden, targets, reduction, label_smoothing)

    @torch.no_grad()
    def prefill(
        self,
        source_ids: Tensor,
        source_positions: Tensor,
        source_where: Sequences,
        input_ids: Tensor,
        positions: Tensor,
        where: Sequences,
        new_tokens: int,
    ) -> tuple[Tensor, Cache]:
        """Read sources and the beginnings of targets; return what `step` continues from.

        That is the last hidden states (N, width), and a cache with room for `new_tokens` more
        tokens a target. Every target begins with at least one token.
        """
        self._check_pairs(source_where, where)
        self.check_length(where.max_seqlen + new_tokens)
        if (where.lengths() < 1).any():
            raise ValueError("input_ids: got an empty target, expected at least one token in each")
        memory = self.encode(source_ids, source_positions, source_where)
        cache = Cache(where, new_tokens, self.decoder.project_memory(memory, source_where))
        x = self.embed(input_ids, positions, where, "input")
        return self.decoder.prefill(x, where, cache)[where.cu_seqlens[1:].long() - 1], cache

    @torch.no_grad()
    def step(self, input_ids: Tensor, cache: Cache) -> Tensor:
        """Read one target token each (N,); return the hidden states (N, width) behind them."""
        return self.decoder.step(self.embedding(input_ids, cache.lengths.long()), cache)

    def start(
        self, prompts: Sequence[Sequence[int]], new_tokens: int, start_id: int | None = None
    ) -> tuple[Tensor, Cache]:
        """Begin targets for the sources `prompts`, as `generate` asks, with `start_id` each."""
        if start_id is None:
            raise ValueError("start_id: got None, expected the token that every target begins with")
        begun = pack_ids([[start_id]] * len(prompts), self.device)
        return self.prefill(*pack_ids(prompts, self.device), *begun, new_tokens)

    def _check_pairs(self, source_where: Sequences, where: Sequences) -> None:
        sources, targets = len(source_where.cu_seqlens) - 1, len(where.cu_seqlens) - 1
        if sources != targets:
            raise ValueError(f"source_where: got {sources} sequences, expected {targets} as where")
