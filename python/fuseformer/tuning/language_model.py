"""A trained model and its tokenizer, as evaluation and generation ask for them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fuseformer.models.encoder_decoder import EncoderDecoder
from fuseformer.models.generation import generate
from fuseformer.models.masked_lm import MaskedLM
from fuseformer.models.modes import evaluating
from fuseformer.models.scoring import sequence_nll
from fuseformer.models.sequences import pack_ids, per_sequence_sum
from fuseformer.tuning.instructions import IGNORE_INDEX
from fuseformer.tuning.prompts import Room
from fuseformer.tuning.tokenizer import Tokenizer


class TunedModel:
    """Continues prompts and scores answers; satisfies `evaluation.LanguageModel`.

    For an encoder-decoder the prompt is what the encoder reads, and the labelled tokens what the
    decoder writes. With `no_repeat`, no run of so many tokens comes twice in what it writes. Raises
    `ValueError` for a masked language model, which neither continues nor scores.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Tokenizer, no_repeat: int | None = None
    ) -> None:
        if isinstance(model, MaskedLM):
            raise ValueError("model: a masked language model cannot write, only fill gaps")
        self.model: Any = model
        self.tokenizer = tokenizer
        self.no_repeat = no_repeat

    @property
    def room(self) -> Room:
        """The tokens that the model has room for."""
        return Room(self.model.config.max_length, isinstance(self.model, EncoderDecoder))

    def _source(self, prompt: Sequence[int]) -> list[int]:
        """Return what the encoder reads for a prompt: no beginning, but an end."""
        return [*prompt[1:], self.tokenizer.eos_id]

    def generate(
        self, prompt_ids: list[list[int]], max_new_tokens: int, **sampling: Any
    ) -> list[list[int]]:
        """Continue each prompt, up to the end token; greedily unless `sampling` says otherwise."""
        if isinstance(self.model, EncoderDecoder):
            prompt_ids = [self._source(prompt) for prompt in prompt_ids]
            sampling["start_id"] = self.tokenizer.bos_id
        return generate(
            self.model,
            prompt_ids,
            max_new_tokens,
            end_id=self.tokenizer.eos_id,
            no_repeat=self.no_repeat,
            **sampling,
        )

    @torch.no_grad()
    def score(self, sequences: list[list[int]], labels: list[list[int]]) -> list[tuple[float, int]]:
        """Return each sequence's summed NLL in nats over its labels, and how many there are."""
        model = self.model
        if not isinstance(model, EncoderDecoder):
            return sequence_nll(model, sequences, labels)
        pairs = []
        for ids, own in zip(sequences, labels, strict=True):
            begin = next(i for i, label in enumerate(own) if label != IGNORE_INDEX)
            pairs.append((self._source(ids[:begin]), ids[begin:]))
        bos = self.tokenizer.bos_id
        sources = pack_ids([source for source, _ in pairs], model.device)
        inputs, positions, where = pack_ids(
            [[bos, *target[:-1]] for _, target in pairs], model.device
        )
        targets = pack_ids([target for _, target in pairs], model.device)[0]
        with evaluating(model):
            losses = model.loss(*sources, inputs, positions, targets, where, reduction="none")
        sums = per_sequence_sum(losses.double(), where).tolist()
        return [(nll, len(target)) for nll, (_, target) in zip(sums, pairs, strict=True)]
