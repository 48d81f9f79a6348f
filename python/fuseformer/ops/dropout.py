"""The dropout mask as an op of its own, for what drops attention weights outside a kernel."""

import torch
from torch import Tensor

from .. import philox


@torch.library.custom_op("fuseformer::keep_mask", mutates_args=())
def keep_mask(seed: Tensor, p: float, batch: int, heads: int, rows: int, columns: int) -> Tensor:
    """Return which attention weights dropout keeps, bool (batch, heads, rows, columns).

    `seed` is an int64 scalar tensor on the device of the result. The elements are those that
    `fuseformer.attention` keeps for the same seed and probability.
    """
    where = (range(batch), range(heads), range(rows))
    if seed.device.type == "cpu":
        from ..cpu import dropout

        return dropout.keep_mask(seed, p, *where, range(columns)).contiguous()
    return philox.keep_mask(seed, p, *where, columns).contiguous()


@keep_mask.register_fake
def _(seed: Tensor, p: float, batch: int, heads: int, rows: int, columns: int) -> Tensor:
    return seed.new_empty((batch, heads, rows, columns), dtype=torch.bool)
