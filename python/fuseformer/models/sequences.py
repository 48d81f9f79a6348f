"""Packed sequences: where each begins, how to pack lists of ids, sums over each."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Sequences(NamedTuple):
    """Where the packed sequences begin, (N + 1,) int32, and the length of the longest."""

    cu_seqlens: Tensor
    max_seqlen: int

    def lengths(self) -> Tensor:
        """Return the length of each sequence, (N,) int32."""
        return self.cu_seqlens.diff()

    def owners(self, tokens: int) -> Tensor:
        """Return the number of the sequence that each of the `tokens` belongs to, (tokens,)."""
        lengths = self.lengths().long()
        index = torch.arange(len(lengths), device=lengths.device)
        return torch.repeat_interleave(index, lengths, output_size=tokens)


def pack_ids(
    sequences: Sequence[Sequence[int]], device: torch.device | str | None = None
) -> tuple[Tensor, Tensor, Sequences]:
    """Lay sequences of ids end to end; return ids (T,) and positions (T,), int64, and where."""
    lengths = [len(sequence) for sequence in sequences]
    offsets = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
    ids = torch.tensor(
        [token for sequence in sequences for token in sequence], dtype=torch.int64, device=device
    )
    positions = torch.tensor(
        [p for length in lengths for p in range(length)], dtype=torch.int64, device=device
    )
    return ids, positions, Sequences(offsets, max(lengths, default=0))


def per_sequence_sum(values: Tensor, where: Sequences) -> Tensor:
    """Return the sums (N, ...) of `values` (T, ...) over each sequence; 0 for an empty one."""
    # segment_reduce and not index_add, whose atomics on a GPU add in an order that changes.
    return torch.segment_reduce(values, "sum", lengths=where.lengths().long(), initial=0)


def per_sequence_logsumexp(scores: Tensor, where: Sequences) -> Tensor:
    """Return the log of the sum of exponentials (N,) of `scores` (T,) over each sequence."""
    lengths = where.lengths().long()
    peak = torch.segment_reduce(scores.detach(), "max", lengths=lengths)  # (N,)
    shifted = scores - peak[where.owners(len(scores))]
    return peak + per_sequence_sum(shifted.exp(), where).log()
