"""A decoder-only language model of the reference blocks, with a cache for generation."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from .cache import Cache
from .language_model import LanguageModel
from .sequences import Sequences, pack_ids


class CausalLM(LanguageModel):
    """A language model that predicts the next token (GPT-like, post-LN).

    Source: Radford et al., "Improving Language Understanding by Generative Pre-Training", 2018.
    """

    causal: ClassVar[bool] = True

    @torch.no_grad()
    def prefill(
        self, input_ids: Tensor, positions: Tensor, where: Sequences, new_tokens: int
    ) -> tuple[Tensor, Cache]:
        """Read prompts; return the last hidden states (N, width) and a cache for what follows.

        The cache has room for `new_tokens` more tokens a sequence. Every prompt has a token.
        """
        self.check_length(where.max_seqlen + new_tokens)
        if (where.lengths() < 1).any():
            raise ValueError("input_ids: got an empty prompt, expected at least one token in each")
        cache = Cache(where, new_tokens)
        x = self.embed(input_ids, positions, where, "input")
        return self.blocks.prefill(x, where, cache)[where.cu_seqlens[1:].long() - 1], cache

    @torch.no_grad()
    def step(self, input_ids: Tensor, cache: Cache) -> Tensor:
        """Read one token a sequence (N,); return the hidden states (N, width) behind them."""
        return self.blocks.step(self.embedding(input_ids, cache.lengths.long()), cache)

    def start(
        self, prompts: Sequence[Sequence[int]], new_tokens: int, start_id: int | None = None
    ) -> tuple[Tensor, Cache]:
        """Begin to continue `prompts`, as `generate` asks; they need no `start_id`."""
        if start_id is not None:
            raise ValueError(f"start_id: got {start_id}, expected None: the prompt is continued")
        return self.prefill(*pack_ids(prompts, self.device), new_tokens)
