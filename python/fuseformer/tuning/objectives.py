"""What a model learns from: how text becomes examples, and the loss of a packed batch."""

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from fuseformer.models.causal_lm import CausalLM
from fuseformer.models.config import ModelConfig
from fuseformer.models.encoder_decoder import EncoderDecoder
from fuseformer.models.language_model import LanguageModel
from fuseformer.models.masked_lm import MaskedLM
from fuseformer.models.sequences import Sequences, per_sequence_sum
from fuseformer.tuning.batches import (
    Example,
    PackedBatch,
    Seq2SeqBatch,
    Seq2SeqExample,
    causal_chunks,
    causal_example,
    mask_tokens,
    masked_chunks,
    seq2seq_example,
)
from fuseformer.tuning.instructions import IGNORE_INDEX, Record, encode_prompt, encode_record
from fuseformer.tuning.recipe import Recipe
from fuseformer.tuning.tokenizer import Tokenizer


class Objective(Protocol):
    """One way to learn: a kind of model, examples of text, and the loss of each token."""

    recipe: Recipe
    model_class: type[nn.Module]

    def new_model(self, config: ModelConfig) -> nn.Module:
        """Return a model of this objective's kind with fresh weights."""

    def from_documents(self, texts: Sequence[str]) -> Sequence[Any]:
        """Return examples of plain text; raises `ValueError` where the objective cannot."""

    def from_records(self, records: Sequence[Record]) -> Sequence[Any]:
        """Return examples of instruction records; raises `ValueError` where it cannot."""

    def token_losses(self, model: Any, batch: Any, reduction: str) -> tuple[Tensor, Tensor]:
        """Return the loss, per token (T,) or their sum, and the targets (T,) it belongs to."""


class _WithTokenizer:
    def __init__(self, tokenizer: Tokenizer, recipe: Recipe) -> None:
        self.tokenizer, self.recipe = tokenizer, recipe
        self.max_length = recipe.max_length
        self.truncation = None if recipe.truncation == "error" else recipe.truncation


def _where(batch: PackedBatch) -> Sequences:
    return Sequences(batch.cu_seqlens, batch.max_seqlen)


def _language_model_loss(
    model: LanguageModel, batch: PackedBatch, reduction: str
) -> tuple[Tensor, Tensor]:
    where = _where(batch)
    loss = model.loss(batch.input_ids, batch.positions, batch.targets, where, reduction=reduction)
    return loss, batch.targets


class CausalObjective(_WithTokenizer):
    """Predict each token from those before it; of a record, the tokens of its answer."""

    model_class: type[nn.Module] = CausalLM

    def new_model(self, config: ModelConfig) -> nn.Module:
        """Return a `CausalLM`."""
        return CausalLM(config)

    def from_documents(self, texts: Sequence[str]) -> list[Example]:
        """Cut documents into examples in which each token is predicted once."""
        t = self.tokenizer
        return causal_chunks(t.encode_batch(texts), self.max_length, t.bos_id, t.eos_id)

    def from_records(self, records: Sequence[Record]) -> list[Example]:
        """Lay each prompt and answer end to end, the answer supervised."""
        # Shifting takes one token away, so that one more than the model reads may come in.
        return [
            causal_example(
                *encode_record(
                    record,
                    self.tokenizer,
                    max_length=self.max_length + 1,
                    truncation=self.truncation,
                )
            )
            for record in records
        ]

    def token_losses(
        self, model: CausalLM, batch: PackedBatch, reduction: str
    ) -> tuple[Tensor, Tensor]:
        """Return the cross entropy of the next tokens."""
        return _language_model_loss(model, batch, reduction)


class MaskedObjective(_WithTokenizer):
    """Restore hidden tokens from both sides (Devlin et al. 2018, section 3.1)."""

    model_class: type[nn.Module] = MaskedLM

    def new_model(self, config: ModelConfig) -> nn.Module:
        """Return a `MaskedLM`."""
        return MaskedLM(config)

    def from_documents(self, texts: Sequence[str]) -> list[Example]:
        """Cut documents into examples; which tokens are hidden is drawn batch by batch."""
        t = self.tokenizer
        return masked_chunks(t.encode_batch(texts), self.max_length, t.bos_id, t.eos_id)

    def from_records(self, records: Sequence[Record]) -> list[Example]:
        """Raise `ValueError`: a masked language model does not write."""
        raise ValueError(
            "objective: a masked language model cannot answer instructions; use causal or seq2seq"
        )

    def token_losses(
        self, model: MaskedLM, batch: PackedBatch, reduction: str
    ) -> tuple[Tensor, Tensor]:
        """Return the cross entropy of the hidden tokens; the batch's seed draws which."""
        masked = mask_tokens(
            batch,
            mask_id=self.tokenizer.mask_id,
            vocab_size=self.tokenizer.vocab_size,
            special_ids=self.tokenizer.special_ids,
            share=self.recipe.masked_share,
        )
        return _language_model_loss(model, masked, reduction)


class Seq2SeqObjective(_WithTokenizer):
    """Read a prompt with the encoder, write its answer with the decoder."""

    model_class: type[nn.Module] = EncoderDecoder

    def new_model(self, config: ModelConfig) -> nn.Module:
        """Return an `EncoderDecoder`."""
        return EncoderDecoder(config)

    def from_documents(self, texts: Sequence[str]) -> list[Seq2SeqExample]:
        """Make the first half of each chunk of text the source and its second half the target."""
        t, examples = self.tokenizer, []
        span = 2 * (self.max_length - 1)
        for ids in t.encode_batch(texts):
            for start in range(0, len(ids), span):
                piece = ids[start : start + span]
                middle = len(piece) // 2
                if middle:
                    examples.append(
                        seq2seq_example(piece[:middle], piece[middle:], t.bos_id, t.eos_id)
                    )
        return examples

    def from_records(self, records: Sequence[Record]) -> list[Seq2SeqExample]:
        """Make each prompt a source and its answer a target."""
        t, examples, room = self.tokenizer, [], self.max_length - 1
        for record in records:
            source = encode_prompt(record, t)[1:]
            answer = encode_record(record, t)[0][len(source) + 1 : -1]
            too_long = max(len(source), len(answer)) > room
            if too_long and (self.truncation is None or len(answer) > room):
                raise ValueError(
                    f"record of task {record.task!r} has a prompt of {len(source)} and an answer "
                    f"of {len(answer)} tokens, the model takes {room} each; shorten it "
                    'or ask for truncation="input"'
                )
            # The end of a prompt says that an answer is due, so its input loses the middle.
            if too_long:
                source = source[: room - room // 4] + source[len(source) - room // 4 :]
            examples.append(seq2seq_example(source, answer, t.bos_id, t.eos_id))
        return examples

    def token_losses(
        self, model: EncoderDecoder, batch: Seq2SeqBatch, reduction: str
    ) -> tuple[Tensor, Tensor]:
        """Return the cross entropy of the target tokens."""
        loss = model.loss(
            batch.source_ids,
            batch.source_positions,
            Sequences(batch.source_cu_seqlens, batch.source_max_seqlen),
            batch.input_ids,
            batch.positions,
            batch.targets,
            _where(batch),
            reduction=reduction,
        )
        return loss, batch.targets


_OBJECTIVES: dict[str, type[CausalObjective] | type[MaskedObjective] | type[Seq2SeqObjective]] = {
    "causal": CausalObjective,
    "masked": MaskedObjective,
    "seq2seq": Seq2SeqObjective,
}


def make_objective(recipe: Recipe, tokenizer: Tokenizer) -> Objective:
    """Return the objective that a recipe names."""
    return _OBJECTIVES[recipe.objective](tokenizer, recipe)


def objective_of(model: nn.Module) -> str:
    """Return the name of the objective that trains a model of this kind."""
    return next(name for name, made in _OBJECTIVES.items() if type(model) is made.model_class)


def weighted_loss(
    objective: Objective, model: nn.Module, batch: PackedBatch, weighting: str
) -> tuple[Tensor, float]:
    """Return a batch's summed loss and the weight to divide it by, over all batches of a step.

    With `weighting` "token" every supervised token counts alike, with "record" every sequence, so
    that a one-word answer is heard as well as a sentence. "root" lies between the two: a sequence
    of n supervised tokens counts as the square root of n.
    """
    if weighting == "token":
        total, targets = objective.token_losses(model, batch, "sum")
        return total, float((targets != IGNORE_INDEX).sum())
    losses, targets = objective.token_losses(model, batch, "none")  # (T,)
    where = _where(batch)
    counts = per_sequence_sum((targets != IGNORE_INDEX).to(losses.dtype), where)  # (N,)
    means = per_sequence_sum(losses, where) / counts.clamp(min=1)  # (N,)
    weights = counts.clamp(max=1) if weighting == "record" else counts.sqrt()  # (N,)
    return (means * weights).sum(), float(weights.sum())
