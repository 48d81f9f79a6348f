"""Packed batches by a budget of tokens, in an order that a checkpoint can store and resume.

Sequences are laid end to end, without padding; `cu_seqlens` says where each begins, as
`varlen_attention` reads it.
"""

import zlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from fuseformer.tuning.instructions import IGNORE_INDEX
from fuseformer.tuning.splitting import stable_hash

MASKED_SHARE = 0.15


@dataclass(frozen=True)
class Example:
    """A sequence and, for each of its positions, the token to predict there (-100 for none)."""

    input_ids: list[int]
    targets: list[int]

    @property
    def tokens(self) -> int:
        """The positions it takes in a batch."""
        return len(self.input_ids)


@dataclass(frozen=True)
class Seq2SeqExample:
    """A source to read and a target to write."""

    source_ids: list[int]
    input_ids: list[int]
    targets: list[int]

    @property
    def tokens(self) -> int:
        """The positions it takes in a batch, source and target together."""
        return len(self.source_ids) + len(self.input_ids)


@dataclass(frozen=True)
class PackedBatch:
    """Sequences laid end to end.

    `input_ids`, `targets` and `positions` are `(T,)` int64, positions counted from the start of
    each sequence; `cu_seqlens` is `(N + 1,)` int32 with the boundaries; `max_seqlen` the longest
    length; `seed` belongs to this batch alone, for masking.
    """

    input_ids: Tensor
    targets: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    positions: Tensor
    seed: int

    @property
    def tokens(self) -> int:
        """How many positions a model computes."""
        return self.input_ids.numel()

    @property
    def supervised(self) -> int:
        """How many positions have a target."""
        return int((self.targets != IGNORE_INDEX).sum())

    def to(self, device: torch.device | str) -> "PackedBatch":
        """Return the batch, of the same class, with its tensors on `device`."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {k: v.to(device) for k, v in values.items() if isinstance(v, Tensor)}
        return type(self)(**{**values, **moved})


@dataclass(frozen=True)
class Seq2SeqBatch(PackedBatch):
    """Packed targets, as in `PackedBatch`, and packed sources, `(S,)` with their own boundaries."""

    source_ids: Tensor
    source_cu_seqlens: Tensor
    source_max_seqlen: int
    source_positions: Tensor

    @property
    def tokens(self) -> int:
        """How many positions a model computes, sources and targets together."""
        return self.input_ids.numel() + self.source_ids.numel()


AnyExample = TypeVar("AnyExample", Example, Seq2SeqExample)


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
    documents: Sequence[Sequence[int]], max_length: int, bos_id: int, eos_id: int
) -> list[Example]:
    """Cut documents into examples of at most `max_length` positions, each token predicted once."""
    _check_positive("max_length", max_length)
    examples = []
    for document in documents:
        ids = [bos_id, *document, eos_id]
        for start in range(0, len(ids) - 1, max_length):
            examples.append(causal_example(ids[start : start + max_length + 1]))
    return examples


def masked_chunks(
    documents: Sequence[Sequence[int]], max_length: int, bos_id: int, eos_id: int
) -> list[Example]:
    """Cut documents into examples of at most `max_length` tokens, to be masked batch by batch."""
    _check_positive("max_length", max_length)
    examples = []
    for document in documents:
        ids = [bos_id, *document, eos_id]
        for start in range(0, len(ids), max_length):
            piece = ids[start : start + max_length]
            examples.append(Example(piece, [IGNORE_INDEX] * len(piece)))
    return examples


def pack(sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, int, Tensor]:
    """Lay sequences end to end; return `(ids, cu_seqlens, max_seqlen, positions)`.

    `ids` and `positions` are `(T,)` int64, `cu_seqlens` is `(N + 1,)` int32.
    """
    lengths = [len(sequence) for sequence in sequences]
    cu_seqlens = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    cu_seqlens[1:] = torch.tensor(lengths, dtype=torch.int64).cumsum(0)
    ids = torch.tensor([token for sequence in sequences for token in sequence], dtype=torch.int64)
    positions = torch.tensor([p for length in lengths for p in range(length)], dtype=torch.int64)
    return ids, cu_seqlens, max(lengths, default=0), positions


def collate(examples: Sequence[Example] | Sequence[Seq2SeqExample], seed: int = 0) -> PackedBatch:
    """Pack examples of one kind into a batch."""
    if not examples:
        raise ValueError("examples: got none, want at least one")
    ids, cu_seqlens, longest, positions = pack([example.input_ids for example in examples])
    targets = torch.tensor([t for example in examples for t in example.targets], dtype=torch.int64)
    sources = [example.source_ids for example in examples if isinstance(example, Seq2SeqExample)]
    if not sources:
        return PackedBatch(ids, targets, cu_seqlens, longest, positions, seed)
    return Seq2SeqBatch(ids, targets, cu_seqlens, longest, positions, seed, *pack(sources))


def mask_tokens(
    batch: PackedBatch,
    *,
    mask_id: int,
    vocab_size: int,
    special_ids: Sequence[int],
    share: float = MASKED_SHARE,
) -> PackedBatch:
    """Return a batch for masked language modelling (Devlin et al. 2018, section 3.1).

    A `share` of the tokens gets a target; of these 80 % become `mask_id`, 10 % a random ordinary
    token, 10 % stay. Special tokens are never chosen, and at least one other always is. The choice
    is fixed by the batch's seed.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share: got {share}, want 0 < share <= 1")
    generator = torch.Generator().manual_seed(batch.seed)
    ids = batch.input_ids.cpu()
    special = torch.tensor(sorted(special_ids), dtype=torch.int64)
    draw = torch.rand(ids.shape, generator=generator).masked_fill(torch.isin(ids, special), 2.0)
    chosen = draw < share
    if not chosen.any() and bool((draw < 2).any()):
        chosen[draw.argmin()] = True
    action = torch.rand(ids.shape, generator=generator)
    ordinary = torch.tensor(sorted(set(range(vocab_size)) - set(special_ids)), dtype=torch.int64)
    random = ordinary[torch.randint(len(ordinary), ids.shape, generator=generator)]
    inputs = torch.where(chosen & (action < 0.8), mask_id, ids)
    inputs = torch.where(chosen & (action >= 0.9), random, inputs)
    targets = torch.where(chosen, ids, IGNORE_INDEX)
    device = batch.input_ids.device
    return replace(batch, input_ids=inputs.to(device), targets=targets.to(device))


class PackedSampler:
    """Endless packed batches of at most `tokens_per_batch` positions, epoch after epoch.

    Each epoch visits every example once, in an order drawn from the seed and the epoch's number.
    The state is three integers, so that a resumed run sees the very batches that it would have
    seen. Examples longer than `max_length` raise `ValueError`, or are cut at the end with
    `truncation="right"`.
    """

    def __init__(
        self,
        examples: Sequence[AnyExample],
        *,
        tokens_per_batch: int,
        max_length: int,
        seed: int = 0,
        shuffle: bool = True,
        truncation: str | None = None,
    ) -> None:
        _check_positive("tokens_per_batch", tokens_per_batch)
        _check_positive("max_length", max_length)
        if truncation not in (None, "right"):
            raise ValueError(f'truncation: got {truncation!r}, want None or "right"')
        if not examples:
            raise ValueError("examples: got none, want at least one")
        self._examples = [_fitted(example, max_length, truncation) for example in examples]
        longest = max(example.tokens for example in self._examples)
        if longest > tokens_per_batch:
            raise ValueError(
                f"tokens_per_batch: got {tokens_per_batch}, want at least {longest}, the tokens of "
                "the longest example"
            )
        self._budget = tokens_per_batch
        self._shuffle = shuffle
        self.seed, self.epoch, self.position = seed, 0, 0
        self._order = self._draw_order()

    def __iter__(self) -> Iterator[Any]:
        """Return itself: the position moves with each batch taken."""
        return self

    def __next__(self) -> Any:
        """Return the next batch; the last one of an epoch may be small."""
        if self.position == len(self._order):
            self.epoch, self.position = self.epoch + 1, 0
            self._order = self._draw_order()
        batch_seed = _mixed(self.seed, self.epoch, self.position)
        taken, tokens = [], 0
        while self.position < len(self._order):
            example = self._examples[self._order[self.position]]
            if tokens + example.tokens > self._budget:
                break
            taken.append(example)
            tokens += example.tokens
            self.position += 1
        return collate(taken, batch_seed)

    @property
    def tokens_per_epoch(self) -> int:
        """The positions of all examples."""
        return sum(example.tokens for example in self._examples)

    def fingerprint(self) -> str:
        """Return a number, as text, that changes with any token of the examples or their order."""
        crc = 0
        for example in self._examples:
            for part in fields(example):
                crc = zlib.crc32(array("q", getattr(example, part.name)).tobytes(), crc)
        return f"{crc:08x}"

    def state_dict(self) -> dict[str, int]:
        """Return what `load_state_dict` needs to continue with the next batch."""
        return {"seed": self.seed, "epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from a stored state; raises `ValueError` if it does not fit these examples."""
        if set(state) != {"seed", "epoch", "position"}:
            raise ValueError(f"state: got fields {sorted(state)}, want seed, epoch, position")
        if not 0 <= state["position"] <= len(self._examples) or state["epoch"] < 0:
            raise ValueError(
                f"state: position {state['position']} of epoch {state['epoch']} lies outside "
                f"{len(self._examples)} examples: was it saved with other data?"
            )
        self.seed, self.epoch, self.position = state["seed"], state["epoch"], state["position"]
        self._order = self._draw_order()

    def _draw_order(self) -> list[int]:
        if not self._shuffle:
            return list(range(len(self._examples)))
        generator = torch.Generator().manual_seed(_mixed(self.seed, self.epoch, -1))
        return torch.randperm(len(self._examples), generator=generator).tolist()


def _mixed(seed: int, epoch: int, position: int) -> int:
    return stable_hash(f"{epoch}:{position}", seed) >> 1  # torch takes 63 bits


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name}: got {value}, want at least 1")


def _fitted(example: Any, max_length: int, truncation: str | None) -> Any:
    parts = {f.name: getattr(example, f.name) for f in fields(example)}
    longest = max(map(len, parts.values()))
    if longest <= max_length:
        return example
    if truncation is None:
        raise ValueError(
            f"examples: one has {longest} tokens, the model takes {max_length}; "
            'cut it into chunks or ask for truncation="right"'
        )
    return replace(example, **{name: part[:max_length] for name, part in parts.items()})
