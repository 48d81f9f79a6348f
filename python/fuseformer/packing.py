"""From padded batches to packed tokens and back: what is padding is neither stored nor computed."""

from typing import NamedTuple

import torch
from torch import Tensor


class Packing(NamedTuple):
    """Where the tokens of a padded batch lie in a packed one.

    `indices` (T,) are positions in the flattened (B * S) batch, `cu_seqlens` (B + 1,) int32 the
    offsets of the sequences, `max_seqlen` the longest one, `batch` and `length` the padded sizes.
    """

    indices: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    batch: int
    length: int

    def positions(self) -> Tensor:
        """Return each token's position in its sequence's row, (T,)."""
        return self.indices % max(1, self.length)


def plan_packing(
    key_padding_mask: Tensor, *, tokens: int | None = None, max_seqlen: int | None = None
) -> Packing:
    """Return the packing of a batch whose padding `key_padding_mask` (B, S) bool marks as True.

    Padding may lie anywhere; a sequence of nothing else keeps its place with length 0. `tokens`,
    how many are no padding, and the longest sequence decide shapes and grids, so that on a GPU each
    waits for the device where it is not given; given both, nothing waits. `max_seqlen` may be an
    upper bound. Raises `TypeError` or `ValueError` for a mask of another dtype or shape, on the CPU
    also for numbers that are not those of the mask; on a GPU those fail an assertion there.
    """
    if key_padding_mask.dtype != torch.bool:
        raise TypeError(
            f"key_padding_mask: got dtype {key_padding_mask.dtype}, expected torch.bool"
        )
    if key_padding_mask.dim() != 2:
        raise ValueError(
            f"key_padding_mask: got shape {tuple(key_padding_mask.shape)}, expected (batch, length)"
        )
    real = ~key_padding_mask
    lengths = real.sum(1, dtype=torch.int32)  # (B,)
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    batch, length = key_padding_mask.shape
    if max_seqlen is None:
        max_seqlen = int(lengths.max()) if len(lengths) else 0
    else:
        _require("max_seqlen", max_seqlen, (lengths <= max_seqlen).all())
    if tokens is None:
        indices = real.flatten().nonzero().flatten()
    else:
        _require("tokens", tokens, cu_seqlens[-1] == tokens)
        indices = key_padding_mask.flatten().byte().argsort(stable=True)[:tokens]
    return Packing(indices, cu_seqlens, max_seqlen, batch, length)


def _require(name: str, value: int, holds: Tensor) -> None:
    """Raise `ValueError` unless `holds`; on a device let an assertion fail there, and go on."""
    if holds.device.type != "cpu":
        torch._assert_async(holds, f"{name}: {value} is not what the mask holds")
    elif not holds:
        raise ValueError(f"{name}: got {value}, which is not what key_padding_mask holds")


def pack(padded: Tensor, packing: Packing) -> Tensor:
    """Return the tokens (T, ...) of `padded` (B, S, ...) that are not padding."""
    if tuple(padded.shape[:2]) != (packing.batch, packing.length):
        raise ValueError(
            f"padded: got shape {tuple(padded.shape)}, expected it to begin with "
            f"({packing.batch}, {packing.length})"
        )
    return padded.flatten(0, 1)[packing.indices]


def unpack(tokens: Tensor, packing: Packing, padding_value: float = 0) -> Tensor:
    """Return `tokens` (T, ...) as a padded batch (B, S, ...), `padding_value` elsewhere."""
    if tokens.shape[0] != len(packing.indices):
        raise ValueError(f"tokens: got {tokens.shape[0]} rows, expected {len(packing.indices)}")
    shape = (packing.batch * packing.length, *tokens.shape[1:])
    padded = tokens.new_full(shape, padding_value).index_copy(0, packing.indices, tokens)
    return padded.unflatten(0, (packing.batch, packing.length))
