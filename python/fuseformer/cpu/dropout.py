"""The dropout mask of `fuseformer.philox` on the CPU, compiled where the library is there.

Elsewhere NumPy computes it: in place, block by block. Its integer loops are vectorised and cost
less per call than PyTorch's. A block's counters and their six buffers stay in the caches. Two facts
save passes: words 1 and 3 are read again only where the result is cut to 32 bits, so they may keep
their upper halves, and the upper 16-bit number of a word is compared without being moved down.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import extension
from ..philox import _KEY_INCREMENTS, _MULTIPLIERS, _ROUNDS, dropout_threshold

_LOW_WORD = np.int64(0xFFFFFFFF)
# Counters of a block: six int64 buffers of this length are 768 KiB.
_COUNTERS_PER_BLOCK = 1 << 14
# Elements below which threads cost more to start than they save.
_ELEMENTS_PER_THREAD = 1 << 20


def _words(key: int, *counter: Any) -> list[np.ndarray]:
    """Return the four words (R, C) of the counters (column, row, head, batch), as int64.

    The column is (C,), the row (R, 1), head and batch are (R, 1) or scalars, which is cheaper. In
    the first rounds what is mixed depends on few of them, so they work on vectors.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key & 0xFFFFFFFF, key >> 32 & 0xFFFFFFFF
    m0, m1 = (np.int64(m) for m in _MULTIPLIERS)
    full = (c1.shape[0], c0.shape[0])
    spare = [np.empty(full, np.int64) for _ in range(3)]
    for done in range(_ROUNDS):
        if done < 3:
            p0, p1 = c0 * m0, c2 * m1
            c0 = ((p1 >> 32) ^ (c1 ^ k0)) & _LOW_WORD
            c2 = ((p0 >> 32) ^ (c3 ^ k1)) & _LOW_WORD
        else:
            p0 = np.multiply(c0, m0, out=spare.pop())
            p1 = np.multiply(c2, m1, out=spare.pop())
            for upper, lower, k, c in ((p1, c1, k0, c0), (p0, c3, k1, c2)):
                np.right_shift(upper, 32, out=c)
                np.bitwise_xor(c, lower, out=c)
                np.bitwise_xor(c, np.int64(k), out=c)
                np.bitwise_and(c, _LOW_WORD, out=c)
            spare += [c for c in (c1, c3) if c.shape == full]
        c1, c3 = p1, p0
        k0, k1 = (k0 + _KEY_INCREMENTS[0]) & 0xFFFFFFFF, (k1 + _KEY_INCREMENTS[1]) & 0xFFFFFFFF
    np.bitwise_and(c1, _LOW_WORD, out=c1)
    np.bitwise_and(c3, _LOW_WORD, out=c3)
    return [c0, c1, c2, c3]


def _of_tiles(number: np.ndarray) -> Any:
    """Return the numbers of tiles as (rows, 1), or as a scalar where all tiles have the same."""
    return number[0] if (number == number[0]).all() else number.repeat(8)[:, None]


def keep_mask(
    seed: Tensor,
    p: float,
    batches: Sequence[int],
    heads: Sequence[int],
    rows: range,
    columns: range,
) -> Tensor:
    """Return which elements dropout with probability `p` keeps; the mask of `philox.keep_mask`.

    `batches` and `heads` are any numbers, `rows` and `columns` ranges of step 1. The result is bool
    (len(batches), len(heads), len(rows), len(columns)), True where the element survives.
    """
    if extension.problem() is None:
        keep = torch.empty(len(batches), len(heads), len(rows), len(columns), dtype=torch.bool)
        torch.ops.fuseformer_cpu.dropout_mask(
            seed.cpu(),
            torch.tensor(batches, dtype=torch.int64),
            torch.tensor(heads, dtype=torch.int64),
            rows.start,
            columns.start,
            dropout_threshold(p),
            keep,
        )
        return keep
    return _numpy_keep_mask(seed, p, batches, heads, rows, columns)


def _numpy_keep_mask(
    seed: Tensor,
    p: float,
    batches: Sequence[int],
    heads: Sequence[int],
    rows: range,
    columns: range,
) -> Tensor:
    """Return what `keep_mask` does, without the compiled library."""
    first_row, first_column = rows.start // 16, columns.start // 32
    groups = -(-rows.stop // 16) - first_row if len(rows) else 0
    column_groups = -(-columns.stop // 32) - first_column if len(columns) else 0
    lead = (len(batches), len(heads), groups)
    mask = torch.empty((*lead, 2, 8, column_groups, 4, 8), dtype=torch.bool)
    if mask.numel() == 0:
        return mask.new_empty(len(batches), len(heads), len(rows), len(columns))
    # The bytes of eight columns are one number here, so that the words, which take turns every
    # eight columns, interleave without touching single bytes.
    keep = mask.numpy().view(np.int64).reshape(-1, 2, 8, column_groups, 4)
    key, threshold = int(seed), dropout_threshold(p)
    column = np.arange(first_column * 8, (first_column + column_groups) * 8, dtype=np.int64)
    # Small tiles of many batches and heads go through the generator together.
    tiles = np.meshgrid(
        *(np.array(n, np.int64) for n in (batches, heads, range(groups))), indexing="ij"
    )
    batch, head, group = (n.reshape(-1) for n in tiles)
    step = max(1, _COUNTERS_PER_BLOCK // (column_groups * 64))

    def fill(start: int) -> None:
        part = slice(start, start + step)
        row = (((first_row + group[part]) * 8)[:, None] + np.arange(8)).reshape(-1, 1)
        words = _words(key, column, row, _of_tiles(head[part]), _of_tiles(batch[part]))
        block = keep[part]  # (tiles, 2, 8, columns / 32, 4)
        packed = (len(block), 8, column_groups)
        for index, word in enumerate(words):  # (rows / 2, columns / 4)
            high = word >= threshold << 16
            np.bitwise_and(word, 0xFFFF, out=word)
            block[:, 0, ..., index] = (word >= threshold).view(np.int64).reshape(packed)
            block[:, 1, ..., index] = high.view(np.int64).reshape(packed)

    starts = range(0, len(keep), step)
    threads = min(torch.get_num_threads(), mask.numel() // _ELEMENTS_PER_THREAD)
    if threads > 1:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(fill, starts))
    else:
        for start in starts:
            fill(start)
    whole = mask.view(len(batches), len(heads), groups * 16, column_groups * 32)
    top, left = rows.start - first_row * 16, columns.start - first_column * 32
    return whole[:, :, top : top + len(rows), left : left + len(columns)]
