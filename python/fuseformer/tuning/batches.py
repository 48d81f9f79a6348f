"""Packed batches by a budget of tokens, in an order that a checkpoint can store and resume.

Sequences are laid end to end, without padding; `cu_seqlens` says where each begins, as
`varlen_attention` reads it.
"""

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from fuseformer.tuning.examples import (
    AnyExample,
    Example,
    Examples,
    Seq2SeqExample,
    causal_chunks,
    causal_example,
    masked_chunks,
    seq2seq_example,
)
from fuseformer.tuning.instructions import IGNORE_INDEX
from fuseformer.tuning.splitting import stable_hash

__all__ = [
    "MASKED_SHARE",
    "Example",
    "PackedBatch",
    "PackedSampler",
    "Seq2SeqBatch",
    "Seq2SeqExample",
    "causal_chunks",
    "causal_example",
    "collate",
    "mask_tokens",
    "masked_chunks",
    "pack",
    "seq2seq_example",
]

MASKED_SHARE = 0.15


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
        self._examples = _fitted(Examples.of(examples), max_length, truncation)
        longest = max(map(self._examples.tokens, range(len(self._examples))))
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
            index = self._order[self.position]
            if tokens + self._examples.tokens(index) > self._budget:
                break
            taken.append(self._examples[index])
            tokens += self._examples.tokens(index)
            self.position += 1
        return collate(taken, batch_seed)

    @property
    def tokens_per_epoch(self) -> int:
        """The positions of all examples."""
        return sum(map(self._examples.tokens, range(len(self._examples))))

    def fingerprint(self) -> str:
        """Return a number, as text, that changes with any token of the examples or their order."""
        return self._examples.fingerprint()

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

    def _draw_order(self) -> Sequence[int]:
        if not self._shuffle:
            return range(len(self._examples))
        generator = torch.Generator().manual_seed(_mixed(self.seed, self.epoch, -1))
        drawn = torch.randperm(len(self._examples), generator=generator)
        order = array("i")
        order.frombytes(drawn.to(torch.int32).numpy().tobytes())
        return order


def _mixed(seed: int, epoch: int, position: int) -> int:
    return stable_hash(f"{epoch}:{position}", seed) >> 1  # torch takes 63 bits


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name}: got {value}, want at least 1")


def _fitted(examples: Examples[Any], max_length: int, truncation: str | None) -> Examples[Any]:
    longest = examples.longest()
    if longest <= max_length:
        return examples
    if truncation is None:
        raise ValueError(
            f"examples: one has {longest} tokens, the model takes {max_length}; "
            'cut it into chunks or ask for truncation="right"'
        )
    return Examples.of(
        [
            replace(
                example,
                **{f.name: getattr(example, f.name)[:max_length] for f in fields(example)},
            )
            for example in examples
        ]
    )
