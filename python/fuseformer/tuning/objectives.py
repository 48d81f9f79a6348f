"""What a model learns from: how text becomes examples, and the loss of a packed batch."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from fuseformer.models.causal_lm import CausalLM
from fuseformer.models.config import ModelConfig
from fuseformer.models.encoder_decoder import EncoderDecoder
from fuseformer.models.language_model import LanguageModel
from fuseformer.models.masked_lm import MaskedLM
from fuseformer.models.sequences import Sequences, per_sequence_sum
from fuseformer.tuning.batches import PackedBatch, Seq2SeqBatch, mask_tokens
from fuseformer.tuning.examples import (
    Example,
    Examples,
    Seq2SeqExample,
    causal_chunks,
    causal_example,
    masked_chunks,
    seq2seq_example,
)
from fuseformer.tuning.instructions import IGNORE_INDEX, Record
from fuseformer.tuning.progress import progress, say
from fuseformer.tuning.prompts import EncodedRecord, Room, encode_records, shortened_notice
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

    def encoded(self, records: Sequence[Record], room: Room) -> Iterator[EncodedRecord]:
        """Yield the records as tokens that fit, and say how many had to be cut.

        Raises `ValueError` that names the first record that does not fit, and how many do not.
        """
        lost, problems = 0, []
        with progress(len(records), "tokenising", "record") as bar:
            for made in encode_records(records, self.tokenizer, room, self.recipe.truncation):
                bar.update()
                lost += made.lost > 0
                if made.problem:
                    problems.append(made.problem)
                elif not problems:
                    yield made
        if problems:
            others = f" ({len(problems) - 1} more do not fit)" if len(problems) > 1 else ""
            raise ValueError(problems[0] + others)
        if lost:
            say(shortened_notice(lost, len(records), "records", room.max_length))


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

    def from_documents(self, texts: Sequence[str]) -> Examples[Example]:
        """Cut documents into examples in which each token is predicted once."""
        t = self.tokenizer
        return causal_chunks(t.encode_each(texts), self.max_length, t.bos_id, t.eos_id)

    def from_records(self, records: Sequence[Record]) -> Examples[Example]:
        """Lay each prompt and answer end to end, the answer supervised."""
        examples = Examples(Example)
        for made in self.encoded(records, Room(self.max_length)):
            labels = [IGNORE_INDEX] * len(made.prompt) + made.answer
            examples.append(causal_example(made.prompt + made.answer, labels))
        return examples

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

    def from_documents(self, texts: Sequence[str]) -> Examples[Example]:
        """Cut documents into examples; which tokens are hidden is drawn batch by batch."""
        t = self.tokenizer
        return masked_chunks(t.encode_each(texts), self.max_length, t.bos_id, t.eos_id)

    def from_records(self, records: Sequence[Record]) -> Examples[Example]:
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

    def from_documents(self, texts: Sequence[str]) -> Examples[Seq2SeqExample]:
        """Make the first half of each chunk of text the source and its second half the target."""
        t, examples = self.tokenizer, Examples(Seq2SeqExample)
        span = 2 * (self.max_length - 1)
        for ids in t.encode_each(texts):
            for start in range(0, len(ids), span):
                piece = ids[start : start + span]
                middle = len(piece) // 2
                if middle:
                    examples.append(
                        seq2seq_example(piece[:middle], piece[middle:], t.bos_id, t.eos_id)
                    )
        return examples

    def from_records(self, records: Sequence[Record]) -> Examples[Seq2SeqExample]:
        """Make each prompt a source and its answer a target."""
        t, examples = self.tokenizer, Examples(Seq2SeqExample)
        for made in self.encoded(records, Room(self.max_length, apart=True)):
            # A source has no beginning but an end: as many tokens as the prompt.
            examples.append(seq2seq_example(made.prompt[1:], made.answer[:-1], t.bos_id, t.eos_id))
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
