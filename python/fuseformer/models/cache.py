"""What generation remembers between tokens."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .sequences import Sequences


class Memory(NamedTuple):
    """What a decoder block reads of the source: keys and values (S, heads, head_dim), and where."""

    keys: Tensor
    values: Tensor
    where: Sequences


class Cache:
    """Keys and values of past tokens, (N, heads, capacity, head_dim) a layer, and their number.

    It is made for prompts of the lengths that `where` tells, with room for `new_tokens` more in
    each; a decoder's `memories` of the source, one a layer, ride along.
    """

    def __init__(
        self, where: Sequences, new_tokens: int, memories: Sequence[Memory] | None = None
    ) -> None:
        self.lengths = where.lengths()  # (N,) int32, tokens read so far
        self.capacity = where.max_seqlen + new_tokens
        self.memories = memories
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self._rows = torch.arange(len(self.lengths), device=self.lengths.device)
        offsets = torch.arange(len(self.lengths) + 1, dtype=torch.int32, device=self.lengths.device)
        self.single = Sequences(offsets, 1)  # where one token of each sequence lies

    def memory(self, layer: int) -> Memory | None:
        """Return what block `layer` reads of the source, None without one."""
        return None if self.memories is None else self.memories[layer]

    def fill(self, k: Tensor, v: Tensor, where: Sequences) -> None:
        """Store the next layer's `k` and `v` (T, heads, head_dim) of the packed prompts."""
        rows = where.owners(len(k))
        columns = torch.arange(len(k), device=k.device) - where.cu_seqlens[rows]
        for stored, new in ((self.keys, k), (self.values, v)):
            room = new.new_zeros(len(self.lengths), new.shape[1], self.capacity, new.shape[2])
            room[rows, :, columns] = new
            stored.append(room)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store a new token's `k` and `v` (N, heads, head_dim); return all of that layer's."""
        self.keys[layer][self._rows, :, self.lengths.long()] = k
        self.values[layer][self._rows, :, self.lengths.long()] = v
        return self.keys[layer], self.values[layer]

    def advance(self) -> None:
        """Count the token that every layer has stored."""
        self.lengths = self.lengths + 1
