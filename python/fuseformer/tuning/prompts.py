"""The one shape of a prompt, for training, evaluation and generation, of every kind of model.

A prompt that fits is never cut, whatever may follow it. One that does not fit loses the end of its
input, never its instruction or the words of the template behind it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from fuseformer.tuning.instructions import Record

BLOCK = 2048


class TextEncoder(Protocol):
    """What encoding a record asks of a tokenizer."""

    bos_id: int
    eos_id: int

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, without special tokens."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text."""


@dataclass(frozen=True)
class PromptTemplate:
    """The words around a record; `with_input` and `without_input` are `str.format` patterns.

    The answer begins with a space, because a byte-level tokenizer keeps a space with the word after
    it: a prompt that ended in one would split that word differently from the rest of the text.
    """

    with_input: str = "Task: {instruction}\n{input}\nAnswer:"
    without_input: str = "Task: {instruction}\nAnswer:"

    def prompt(self, instruction: str, input: str = "") -> str:
        """Return the text that the model is asked to continue."""
        pattern = self.with_input if input else self.without_input
        return pattern.format(instruction=instruction, input=input)

    def answer(self, output: str) -> str:
        """Return the text of the answer as it follows the prompt."""
        return f" {output}"


DEFAULT_TEMPLATE = PromptTemplate()


@dataclass(frozen=True)
class Room:
    """The tokens that a model has room for: a prompt and its answer together, or `apart`.

    Apart is how an encoder-decoder reads them: source and target have `max_length` positions each.
    Prompts count their first, and answers their last special token.
    """

    max_length: int
    apart: bool = False

    @property
    def reserve(self) -> int:
        """What a prompt that must be cut leaves to its answer, however short that is.

        Where it is cut must not depend on the answer, which is unknown to `generate`.
        """
        return self.max_length // 4

    def for_prompt(self, answer: int) -> int:
        """Return how long a prompt can be in front of an answer of so many tokens."""
        # The last token is predicted and never read.
        return self.max_length if self.apart else self.max_length + 1 - answer

    def holds(self, prompt: int, answer: int) -> bool:
        """Say whether a model can be trained on a prompt and an answer of these lengths."""
        return prompt <= self.for_prompt(answer) and answer <= self.max_length

    def for_new_tokens(self, prompt: int) -> int:
        """Return how many tokens a model can write behind a prompt, 0 where it does not fit."""
        if self.apart:  # the target begins with a token of its own
            return self.max_length - 1 if prompt <= self.max_length else 0
        return max(0, self.max_length - prompt)


@dataclass(frozen=True)
class EncodedRecord:
    """A record's prompt and answer as tokens, special ones included.

    `lost` is how many characters the input lost; `problem`, where it is not empty, says why the
    record cannot be used.
    """

    prompt: list[int]
    answer: list[int]
    lost: int = 0
    problem: str = ""


def encode_prompt(
    record: Record, tokenizer: TextEncoder, template: PromptTemplate = DEFAULT_TEMPLATE
) -> list[int]:
    """Return the ids of a record's whole prompt, the beginning-of-sequence token first."""
    return [tokenizer.bos_id, *tokenizer.encode(template.prompt(record.instruction, record.input))]


def encode_answer(
    record: Record, tokenizer: TextEncoder, template: PromptTemplate = DEFAULT_TEMPLATE
) -> list[int]:
    """Return the ids of a record's answer, the end-of-sequence token last."""
    return [*tokenizer.encode(template.answer(record.output)), tokenizer.eos_id]


def encode_records(
    records: Sequence[Record],
    tokenizer: TextEncoder,
    room: Room,
    truncation: str = "error",
    *,
    template: PromptTemplate = DEFAULT_TEMPLATE,
    answer_tokens: int | None = None,
) -> Iterator[EncodedRecord]:
    """Yield each record as tokens that fit into `room`, or with the problem why it does not.

    With `truncation="input"`, the input of a record that is too long is cut at its end, so that the
    prompt leaves `room.reserve` tokens to the answer, or as many as it needs; with "error" it is a
    problem. An answer is never cut. `answer_tokens` is what to leave room for, if not the record's
    own answer. Raises `ValueError` for another `truncation`.
    """
    if truncation not in ("error", "input"):
        raise ValueError(f'truncation: got {truncation!r}, want "error" or "input"')
    for start in range(0, len(records), BLOCK):
        block = records[start : start + BLOCK]
        prompts = tokenizer.encode_batch([template.prompt(r.instruction, r.input) for r in block])
        answers = tokenizer.encode_batch([template.answer(r.output) for r in block])
        for record, prompt, answer in zip(block, prompts, answers, strict=True):
            encoded = EncodedRecord([tokenizer.bos_id, *prompt], [*answer, tokenizer.eos_id])
            needed = len(encoded.answer) if answer_tokens is None else answer_tokens
            yield _fitted(record, encoded, tokenizer, room, truncation, template, needed)


def shape_prompt(
    instruction: str, input: str, tokenizer: TextEncoder, room: Room, truncation: str
) -> EncodedRecord:
    """Return the prompt of an instruction whose answer is unknown, as `encode_records` shapes it.

    Its `problem` is that the model would have no room for a single token of an answer.
    """
    record = Record(instruction, input, "", "")
    whole = EncodedRecord(encode_prompt(record, tokenizer), [])
    # One token, and the end that is predicted behind it.
    return _fitted(record, whole, tokenizer, room, truncation, DEFAULT_TEMPLATE, 2)


def _fitted(
    record: Record,
    whole: EncodedRecord,
    tokenizer: TextEncoder,
    room: Room,
    truncation: str,
    template: PromptTemplate,
    answer_tokens: int,
) -> EncodedRecord:
    if room.holds(len(whole.prompt), answer_tokens):
        return whole
    if truncation == "input" and record.input and answer_tokens <= room.max_length:
        wanted = room.for_prompt(max(answer_tokens, room.reserve))
        prompt, kept = _shortened(record, tokenizer, template, wanted)
        if room.holds(len(prompt), answer_tokens):
            return replace(whole, prompt=prompt, lost=len(record.input) - kept)
    alone = not record.task  # an instruction that waits for its answer
    where = record.source or ("instruction" if alone else f"record of task {record.task!r}")
    sizes = f"a prompt of {len(whole.prompt)} tokens"
    if whole.answer:
        sizes += f" and an answer of {len(whole.answer)}"
    # The last token of an answer is predicted and not read.
    takes = f"{room.max_length} of each" if room.apart else f"{room.max_length + 1} in all"
    remedy = "shorten it, or "
    remedy += "take a run tuned with --truncation input" if alone else "pass --truncation input"
    if truncation == "input":
        remedy = "too long even without its input"
    return replace(whole, problem=f"{where}: {sizes}, the model takes {takes}; {remedy}")


def _shortened(
    record: Record, tokenizer: TextEncoder, template: PromptTemplate, room: int
) -> tuple[list[int], int]:
    """Return the prompt with as much of the input as fits, none at worst, and its characters."""

    def prompt_of(kept: int) -> list[int]:
        return encode_prompt(replace(record, input=record.input[:kept]), tokenizer, template)

    low, high = 1, len(record.input)
    best, characters = prompt_of(0), 0
    while low <= high:  # bisection over characters
        middle = (low + high) // 2
        prompt = prompt_of(middle)
        if len(prompt) <= room:
            best, characters, low = prompt, middle, middle + 1
        else:
            high = middle - 1
    return best, characters


def shortened_notice(lost: int, count: int, what: str, max_length: int) -> str:
    """Say how many prompts lost the end of their input."""
    room = f"the model takes {max_length} tokens"
    return f"{what}: {lost} of {count} lost the end of their input; {room}"
