"""Instruction records: reading them, rendering the prompt, and turning them into tokens.

A record is ``{"instruction", "input", "output", "task"}``. The model reads the prompt and is
trained on the answer alone: labels are -100 elsewhere.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from fuseformer.tuning.corpora import is_text

IGNORE_INDEX = -100
FIELDS = ("instruction", "input", "output", "task")


@dataclass(frozen=True)
class Record:
    """One instruction, what it is about, the answer wanted, and the task it belongs to."""

    instruction: str
    input: str
    output: str
    task: str


class TextEncoder(Protocol):
    """What encoding a record asks of a tokenizer."""

    bos_id: int
    eos_id: int

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, without special tokens."""


def read_records(path: str | Path) -> list[Record]:
    """Read a JSONL file of records; "input" may be missing, and blank lines are skipped.

    Raises `ValueError` with the file, the line number and what is wrong: not JSON, not an object, a
    missing, unknown, empty or non-string field; also for a file that cannot be read or has no
    record.
    """
    try:
        content = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason})") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    # Not splitlines(): JSON strings may hold U+2028 and its like unescaped.
    records = [
        _record_of_line(line, f"{path}, line {number}")
        for number, line in enumerate(content.split("\n"), 1)
        if line.strip()
    ]
    if not records:
        raise ValueError(f"{path}: no records")
    return records


def _record_of_line(line: str, where: str) -> Record:
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error.msg} at column {error.colno})") from None
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{where}: not JSON that can be read ({error})") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{where}: want an object, got {type(fields).__name__}")
    fields = {"input": "", **fields}
    for name in FIELDS:
        if name not in fields:
            raise ValueError(f'{where}: field "{name}" is missing')
        if not isinstance(fields[name], str):
            raise ValueError(
                f'{where}: field "{name}" is {type(fields[name]).__name__}, want a string'
            )
        if not is_text(fields[name]):
            raise ValueError(
                f'{where}: field "{name}" has half a surrogate pair, want Unicode text'
            )
        if name != "input" and not fields[name].strip():
            raise ValueError(f'{where}: field "{name}" is empty')
    unknown = sorted(set(fields) - set(FIELDS))
    if unknown:
        raise ValueError(f"{where}: unknown field {unknown[0]!r}, want {', '.join(FIELDS)}")
    return Record(**fields)


def write_records(path: str | Path, records: Iterable[Record]) -> None:
    """Write records as JSONL, one a line, in the form that `read_records` reads."""
    lines = (json.dumps(asdict(record), ensure_ascii=False) + "\n" for record in records)
    Path(path).write_text("".join(lines), encoding="utf-8")


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


def encode_prompt(
    record: Record, tokenizer: TextEncoder, template: PromptTemplate = DEFAULT_TEMPLATE
) -> list[int]:
    """Return the ids of a record's prompt, the beginning-of-sequence token first."""
    return [
        tokenizer.bos_id,
        *tokenizer.encode(template.prompt(record.instruction, record.input)),
    ]


def encode_answer(
    record: Record, tokenizer: TextEncoder, template: PromptTemplate = DEFAULT_TEMPLATE
) -> list[int]:
    """Return the ids of a record's answer, the end-of-sequence token last."""
    return [*tokenizer.encode(template.answer(record.output)), tokenizer.eos_id]


def encode_record(
    record: Record,
    tokenizer: TextEncoder,
    *,
    max_length: int | None = None,
    truncation: str | None = None,
    template: PromptTemplate = DEFAULT_TEMPLATE,
) -> tuple[list[int], list[int]]:
    """Return `(input_ids, labels)` of equal length: prompt then answer, labels -100 on the prompt.

    `labels[i]` belongs to `input_ids[i]`; `batches.causal_example` shifts them. A record longer
    than `max_length` tokens raises `ValueError`, unless `truncation="input"` allows its input to be
    cut at the end; the instruction and the answer are never cut.
    """
    if truncation not in (None, "input"):
        raise ValueError(f'truncation: got {truncation!r}, want None or "input"')
    prompt = encode_prompt(record, tokenizer, template)
    answer = encode_answer(record, tokenizer, template)
    length = len(prompt) + len(answer)
    if max_length is not None and length > max_length:
        if truncation is None:
            raise ValueError(
                f"record of task {record.task!r} has {length} tokens, the model takes "
                f'{max_length}; shorten it or ask for truncation="input"'
            )
        prompt = _shortened_prompt(record, tokenizer, template, max_length - len(answer))
    return [*prompt, *answer], [IGNORE_INDEX] * len(prompt) + answer


def _shortened_prompt(
    record: Record, tokenizer: TextEncoder, template: PromptTemplate, room: int
) -> list[int]:
    low, high = 0, len(record.input)
    best: list[int] | None = None
    while low <= high:  # the longest input that fits, by bisection over its characters
        middle = (low + high) // 2
        shorter = Record(record.instruction, record.input[:middle], record.output, record.task)
        prompt = encode_prompt(shorter, tokenizer, template)
        if len(prompt) <= room:
            best, low = prompt, middle + 1
        else:
            high = middle - 1
    if best is None:
        raise ValueError(
            f"record of task {record.task!r}: instruction and answer alone exceed the model's "
            "length"
        )
    return best
