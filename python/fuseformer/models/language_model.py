"""What the models have in common: embeddings that are also the output weights, checks, the loss."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from ..ops.cross_entropy import linear_cross_entropy
from .blocks import Embedding, Stack
from .config import ModelConfig
from .sequences import Sequences

_INTEGERS = (torch.int64, torch.int32)


def _check_range(name: str, values: Tensor, limit: int) -> None:
    # On a GPU, asking would wait for the device: there, the lookup itself fails.
    if values.device.type != "cpu" or torch.compiler.is_compiling() or not len(values):
        return
    low, high = (int(value) for value in values.aminmax())
    if low < 0 or high >= limit:
        raise ValueError(f"{name}: got values from {low} to {high}, expected 0 to {limit - 1}")


class TokenModel(nn.Module):
    """A model from tokens to tokens, whose output weights are its embeddings.

    Source: Press and Wolf, "Using the Output Embedding to Improve Language Models", 2017.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = Embedding(config)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.embedding.tokens.weight.device

    def check_length(self, length: int, name: str = "input_ids") -> None:
        """Raise `ValueError` unless the model has positions for sequences of `length` tokens."""
        if length > self.config.max_length:
            raise ValueError(
                f"{name}: got a sequence of {length} tokens, expected at most the model's "
                f"max_length {self.config.max_length}"
            )

    def embed(self, ids: Tensor, positions: Tensor, where: Sequences, prefix: str) -> Tensor:
        """Return the embeddings (T, width) of packed `ids` (T,) after checking the arguments.

        Errors name ``{prefix}_ids``; `positions` and `where` are their companions.
        """
        name = f"{prefix}_ids"
        companion = "" if prefix == "input" else f"{prefix}_"
        if ids.dim() != 1 or ids.dtype not in _INTEGERS:
            raise ValueError(
                f"{name}: got {ids.dtype} of shape {tuple(ids.shape)}, expected int64 (tokens,)"
            )
        if positions.shape != ids.shape or positions.dtype not in _INTEGERS:
            raise ValueError(
                f"{companion}positions: got {positions.dtype} of shape {tuple(positions.shape)}, "
                f"expected int64 of shape {tuple(ids.shape)} as {name}"
            )
        self.check_length(where.max_seqlen, name)
        _check_range(name, ids, self.config.vocab_size)
        _check_range(f"{companion}positions", positions, self.config.max_length)
        return self.embedding(ids, positions)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the scores (..., vocab_size) of the tokens for `hidden` (..., width)."""
        return nn.functional.linear(hidden, self.embedding.tokens.weight)

    def token_loss(
        self, hidden: Tensor, targets: Tensor, reduction: str, label_smoothing: float = 0.0
    ) -> Tensor:
        """Return the cross entropy of `targets` (T,) for `hidden` (T, width), a chunk at a time."""
        return linear_cross_entropy(
            hidden,
            self.embedding.tokens.weight,
            targets,
            reduction=reduction,
            label_smoothing=label_smoothing,
        )


class LanguageModel(TokenModel):
    """One stack of blocks over packed tokens; `causal` says whether a token sees what follows it.

    `input_ids` (T,) int64 come with their `positions` (T,), below `config.max_length`, and with
    `where` each sequence begins. Methods raise `ValueError` that names the argument.
    """

    causal: ClassVar[bool]

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.blocks = Stack(config)

    def forward(self, input_ids: Tensor, positions: Tensor, where: Sequences) -> Tensor:
        """Return the hidden states (T, width) behind each token."""
        x = self.embed(input_ids, positions, where, "input")
        return self.blocks(x, where, self.causal)

    def loss(
        self,
        input_ids: Tensor,
        positions: Tensor,
        targets: Tensor,
        where: Sequences,
        reduction: str = "mean",
    ) -> Tensor:
        """Return the cross entropy of `targets` (T,), -100 where a token is not supervised.

        A float32 scalar for the reductions "mean" and "sum", (T,) for "none".
        """
        return self.token_loss(self(input_ids, positions, where), targets, reduction)
