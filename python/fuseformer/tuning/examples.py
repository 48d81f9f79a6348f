"""What a model is trained on, example by example, and how text is cut into them.

Examples are kept end to end in flat arrays: lists of Python's numbers would take ten times as much
memory as the text that they come from.
"""

import itertools
import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Generic, TypeVar, overload

from fuseformer.tuning.instructions import IGNORE_INDEX


@dataclass(frozen=True)
class Example:
    """A sequence and, for each of its positions, the token to predict there (-100 for none)."""

    read: ClassVar[tuple[str, ...]] = ("input_ids",)

    input_ids: list[int]
    targets: list[int]

    @property
    def tokens(self) -> int:
        """The positions it takes in a batch."""
        return len(self.input_ids)


@dataclass(frozen=True)
class Seq2SeqExample:
    """A source to read and a target to write."""

    read: ClassVar[tuple[str, ...]] = ("source_ids", "input_ids")

    source_ids: list[int]
    input_ids: list[int]
    targets: list[int]

    @property
    def tokens(self) -> int:
        """The positions it takes in a batch, source and target together."""
        return len(self.source_ids) + len(self.input_ids)


AnyExample = TypeVar("AnyExample", Example, Seq2SeqExample)


BLOCK = 4096


class _Block:
    """Up to `BLOCK` examples: each part of theirs end to end in an array, and where each ends.

    Arrays that grow with a whole corpus would be copied to ever larger places, which leaves holes.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.parts = {name: array("h") for name in names}
        self.ends = {name: array("i", [0]) for name in self.parts}

    def append(self, example: Any) -> None:
        for name, part in list(self.parts.items()):
            ids = getattr(example, name)
            if part.typecode == "h" and max(ids, default=0) > 32_767:
                part = self.parts[name] = array("i", part)
            part.extend(array(part.typecode, ids))
            self.ends[name].append(len(part))

    def part(self, name: str, index: int) -> "array[int]":
        ends = self.ends[name]
        return self.parts[name][ends[index] : ends[index + 1]]


class Examples(Sequence[AnyExample], Generic[AnyExample]):
    """A sequence of examples of one kind, each made when it is asked for.

    A token takes 2 bytes, or 4 where a vocabulary has more than 32,767.
    """

    def __init__(self, kind: type[AnyExample], examples: Iterable[AnyExample] = ()) -> None:
        self._kind: type[Any] = kind
        self._names = tuple(f.name for f in fields(self._kind))
        self._blocks: list[_Block] = []
        self._count = 0
        for example in examples:
            self.append(example)

    @classmethod
    def of(cls, examples: Sequence[Any]) -> "Examples[Any]":
        """Return a non-empty sequence of examples in this form."""
        if isinstance(examples, Examples):
            return examples
        return cls(type(examples[0]), examples)

    def append(self, example: AnyExample) -> None:
        """Add an example at the end."""
        if self._count % BLOCK == 0:
            self._blocks.append(_Block(self._names))
        self._blocks[-1].append(example)
        self._count += 1

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> AnyExample: ...
    @overload
    def __getitem__(self, index: slice) -> "Examples[AnyExample]": ...
    def __getitem__(self, index: int | slice) -> "AnyExample | Examples[AnyExample]":
        if isinstance(index, slice):
            return Examples(self._kind, (self[i] for i in range(*index.indices(len(self)))))
        number, place = divmod(range(len(self))[index], BLOCK)
        block = self._blocks[number]
        return self._kind(**{name: block.part(name, place).tolist() for name in self._names})

    def __eq__(self, other: object) -> bool:
        """Say whether `other` is a sequence of equal examples."""
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def tokens(self, index: int) -> int:
        """Return the positions that example `index`, from 0 up, takes in a batch."""
        block, place = self._blocks[index // BLOCK], index % BLOCK
        ends = (block.ends[name] for name in self._kind.read)
        return sum(own[place + 1] - own[place] for own in ends)

    def longest(self) -> int:
        """Return the tokens of the longest part of any example."""
        return max(
            (
                after - before
                for block in self._blocks
                for ends in block.ends.values()
                for before, after in itertools.pairwise(ends)
            ),
            default=0,
        )

    def fingerprint(self) -> str:
        """Return a number, as text, that changes with any token of the examples or their order."""
        crc = 0
        for index in range(len(self)):
            block, place = self._blocks[index // BLOCK], index % BLOCK
            for name in self._names:
                crc = zlib.crc32(array("q", block.part(name, place)).tobytes(), crc)
        return f"{crc:08x}"


def causal_example(input_ids: Sequence[int], labels: Sequence[int] | None = None) -> Example:
    """Shift a sequence so that position i predicts label i + 1; labels default to the sequence."""
    labels = input_ids if labels is None else labels
    if len(labels) != len(input_ids):
        raise ValueError(f"labels: got {len(labels)}, want one for each of {len(input_ids)} ids")
    if len(input_ids) < 2:
        raise ValueError(f"input_ids: got {len(input_ids)} tokens, want at least 2")
    return Example(list(input_ids[:-1]), list(labels[1:]))


def seq2seq_example(
    source: Sequence[int], target: Sequence[int], bos_id: int, eos_id: int
) -> Seq2SeqExample:
    """Make a source and a target without special tokens into what an encoder-decoder trains on."""
    return Seq2SeqExample([*source, eos_id], [bos_id, *target], [*target, eos_id])


def causal_chunks(
    documents: Iterable[Sequence[int]], max_length: int, bos_id: int, eos_id: int
) -> Examples[Example]:
    """Cut documents into examples of at most `max_length` positions, each token predicted once."""
    examples = Examples(Example)
    for piece in _chunks(documents, max_length, bos_id, eos_id, shared=1):
        examples.append(causal_example(piece))
    return examples


def masked_chunks(
    documents: Iterable[Sequence[int]], max_length: int, bos_id: int, eos_id: int
) -> Examples[Example]:
    """Cut documents into examples of at most `max_length` tokens, to be masked batch by batch."""
    examples = Examples(Example)
    for piece in _chunks(documents, max_length, bos_id, eos_id, shared=0):
        examples.append(Example(list(piece), [IGNORE_INDEX] * len(piece)))
    return examples


def _chunks(
    documents: Iterable[Sequence[int]], max_length: int, bos_id: int, eos_id: int, shared: int
) -> Iterator[Sequence[int]]:
    """Yield pieces of documents, of which neighbours share the tokens between them."""
    if max_length < 1:
        raise ValueError(f"max_length: got {max_length}, want at least 1")
    for document in documents:
        ids = array("i", [bos_id])
        ids.extend(document)
        ids.append(eos_id)
        for start in range(0, len(ids) - shared, max_length):
            yield ids[start : start + max_length + shared]
