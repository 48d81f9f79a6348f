"""Philox4x32-10 in PyTorch integer arithmetic: the dropout mask that every backend reproduces.

One call of the generator yields four 32-bit words, split here into eight 16-bit numbers that decide
a patch of rows {i, i + 8} by columns {j, j + 8, j + 16, j + 24}. In a tensor-core accumulator, and
in that of the transposed product, those eight elements belong to one thread, so that a kernel
computes no word twice. For element (batch b, head h, row i, column j):

    counter = (j // 32 * 8 + j % 8,  i // 16 * 8 + i % 8,  h,  b),   key = the 64-bit seed
    word    = j // 8 % 4,   half = i // 8 % 2 (0 is the low one)

and the element is kept where the 16-bit number is at least ``round(p * 65536)``.

Source: Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_LOW_WORD = 0xFFFFFFFF
_ROUNDS = 10
# Counters processed at a time: their int64 temporaries (about eight) then stay in the outer caches.
_COUNTERS_PER_BLOCK = 1 << 16


def dropout_threshold(p: float) -> int:
    """Return the 16-bit number below which an element is dropped with probability `p`."""
    return round(p * 65536)


def dropout_scale(p: float) -> float:
    """Return the factor of kept elements: one over the probability that the threshold realises."""
    threshold = dropout_threshold(p)
    return 0.0 if threshold == 65536 else 65536 / (65536 - threshold)


def philox_4x32(
    seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the four output words of Philox4x32-10 for counters that broadcast together.

    `seed` is an int64 scalar tensor, the counters are int64 tensors that hold unsigned 32-bit
    values; so do the results. The high half of a product comes from the wrapped 64-bit one: an
    arithmetic shift and a mask are the logical shift that int64 lacks.
    """
    k0, k1 = seed & _LOW_WORD, (seed >> 32) & _LOW_WORD
    for _ in range(_ROUNDS):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        # What is above 32 bits in c1 and c3 goes with the one mask behind the exclusive ors.
        c0 = (product1 >> 32).bitwise_xor(c1 ^ k0).bitwise_and_(_LOW_WORD)
        c2 = (product0 >> 32).bitwise_xor(c3 ^ k1).bitwise_and_(_LOW_WORD)
        c1, c3 = product1, product0
        k0, k1 = (k0 + _KEY_INCREMENTS[0]) & _LOW_WORD, (k1 + _KEY_INCREMENTS[1]) & _LOW_WORD
    return c0, c1 & _LOW_WORD, c2, c3 & _LOW_WORD


def keep_mask(
    seed: Tensor,
    p: float,
    batches: Sequence[int],
    heads: Sequence[int],
    rows: range,
    columns: int,
) -> Tensor:
    """Return which elements dropout with probability `p` keeps.

    `seed` is an int64 scalar tensor and its device is the result's; `batches` and `heads` are any
    numbers, `rows` is a range of step 1, the columns are ``0 .. columns - 1``. The result is a bool
    tensor of shape (len(batches), len(heads), len(rows), columns), True where the element survives.
    """
    device = seed.device
    first = rows.start // 16
    groups = -(-rows.stop // 16) - first if len(rows) else 0
    column_groups = -(-columns // 32)
    lead = (len(batches), len(heads), groups)
    keep = torch.empty((*lead, 2, 8, column_groups, 4, 8), dtype=torch.bool, device=device)
    if keep.numel():
        tiles: list[Tensor] = []
        threshold = dropout_threshold(p)
        column = torch.arange(column_groups * 8, device=device).view(column_groups, 8)
        # Small tiles of many batches and heads go through the generator together.
        batch = torch.tensor(batches, device=device)[:, None, None].expand(lead).flatten()
        head = torch.tensor(heads, device=device)[:, None].expand(lead).flatten()
        row = torch.arange(first * 8, (first + groups) * 8, device=device).view(groups, 8)
        row = row.expand(*lead, 8).reshape(-1, 8)
        step = max(1, _COUNTERS_PER_BLOCK // (column_groups * 64))
        for start in range(0, len(row), step):
            part = slice(start, start + step)
            words = philox_4x32(
                seed,
                column,
                row[part, :, None, None],
                head[part, None, None, None],
                batch[part, None, None, None],
            )  # (tiles, 8, columns / 32, 8) each
            # New tensors, and not into `keep`: under vmap the words of a seed are many.
            low = torch.stack([word & 0xFFFF for word in words], 3)  # (tiles, 8, .., 4, 8)
            high = torch.stack([word >> 16 for word in words], 3)
            tiles.append(torch.stack([low >= threshold, high >= threshold], 1))
        keep = tiles[0] if len(tiles) == 1 else torch.cat(tiles)
    keep = keep.reshape(len(batches), len(heads), groups * 16, column_groups * 32)
    skipped = rows.start - first * 16
    return keep[:, :, skipped : skipped + len(rows), :columns]


def draw_seed(device: torch.device) -> Tensor:
    """Return a fresh int64 scalar seed from torch's generator of `device`.

    Hence `torch.manual_seed` governs it, activation checkpointing repeats it, and on a GPU it can
    be captured in a CUDA graph and differs in each replay.
    """
    return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device)
