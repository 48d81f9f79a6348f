"""Instruction records, ``{"instruction", "input", "output", "task"}``, and their files.

The model reads the prompt and is trained on the answer alone: labels are -100 elsewhere.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from fuseformer.tuning.corpora import is_text
from fuseformer.tuning.readers import json_object, read_lines

IGNORE_INDEX = -100
FIELDS = ("instruction", "input", "output", "task")
SHARED_TEXTS = 10_000


@dataclass(frozen=True, slots=True)
class Record:
    """One instruction, what it is about, the answer wanted, and the task it belongs to.

    `file` and `line` say where it stands; they are no part of what is equal.
    """

    instruction: str
    input: str
    output: str
    task: str
    file: str = field(default="", compare=False, repr=False)
    line: int = field(default=0, compare=False, repr=False)

    @property
    def source(self) -> str:
        """Where it stands, "FILE, line N"; empty for a record of no file."""
        return f"{self.file}, line {self.line}" if self.file else ""


def read_records(path: str | Path) -> list[Record]:
    """Read a JSONL file of records; "input" may be missing, and blank lines are skipped.

    Raises `ValueError` with the file, the line number and what is wrong: not JSON, not an object, a
    missing, unknown, repeated, empty or non-string field; also for a file that cannot be read or
    has no record.
    """
    shared: dict[str, str] = {}  # many records have one instruction, and all have one of few tasks
    name, records = str(path), []
    for number, line in read_lines(path):
        fields = _fields_of_line(line, f"{path}, line {number}")
        for key in ("instruction", "task"):
            if len(shared) < SHARED_TEXTS:
                fields[key] = shared.setdefault(fields[key], fields[key])
            else:
                fields[key] = shared.get(fields[key], fields[key])
        records.append(Record(**fields, file=name, line=number))
    if not records:
        raise ValueError(f"{path}: no records")
    return records


def _fields_of_line(line: str, where: str) -> dict[str, str]:
    fields = {"input": "", **json_object(line, where)}
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
    return fields


def write_records(path: str | Path, records: Iterable[Record]) -> None:
    """Write records as JSONL, one a line, in the form that `read_records` reads."""
    lines = (
        json.dumps({name: getattr(record, name) for name in FIELDS}, ensure_ascii=False) + "\n"
        for record in records
    )
    Path(path).write_text("".join(lines), encoding="utf-8")
