"""What `torch.utils.flop_counter.FlopCounterMode` counts for the ops: their matrix products.

As for PyTorch's own ops, a multiplication and an addition are two operations, a mask saves none,
and the backward pass of attention counts the logits that it computes again. Norms and rotary
embeddings count nothing, like other elementwise ops.
"""

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import register_flop_formula

_OPS = torch.ops.fuseformer


def _lengths(ends: Tensor, most: int, count: int) -> list[int]:
    """Return the lengths `ends` of `count` sequences, or their bound where they are fake."""
    known = not isinstance(ends, FakeTensor) and ends.device.type != "meta"
    return ends.tolist() if known else [most] * count


def _dense_pairs(q: Tensor, k: Tensor) -> int:
    batch, heads, queries, _ = q.shape
    return batch * heads * queries * k.shape[2]


def _packed_pairs(q: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> int:
    count = cu_q.shape[0] - 1
    queries, keys = _lengths(cu_q.diff(), max_q, count), _lengths(cu_k.diff(), max_k, count)
    return q.shape[1] * sum(a * b for a, b in zip(queries, keys, strict=True))


@register_flop_formula(_OPS.attention, get_raw=True)
def _attention(q: Tensor, k: Tensor, *rest: Any, **_: Any) -> int:
    return 2 * 2 * _dense_pairs(q, k) * q.shape[3]


@register_flop_formula(_OPS.attention_backward, get_raw=True)
def _attention_backward(dout: Any, dlse: Any, q: Tensor, k: Tensor, *rest: Any, **_: Any) -> int:
    return 5 * 2 * _dense_pairs(q, k) * q.shape[3]


@register_flop_formula(_OPS.varlen_attention, get_raw=True)
def _varlen(q: Tensor, k: Any, v: Any, *rest: Any, **_: Any) -> int:
    return 2 * 2 * _packed_pairs(q, *rest[:4]) * q.shape[2]


@register_flop_formula(_OPS.varlen_attention_backward, get_raw=True)
def _varlen_backward(*arguments: Any, **_: Any) -> int:
    q = arguments[2]
    return 5 * 2 * _packed_pairs(q, *arguments[7:11]) * q.shape[2]


@register_flop_formula(_OPS.decode_attention, get_raw=True)
def _decode(q: Tensor, k: Tensor, v: Any, lengths: Tensor, table: Any, *rest: Any, **_: Any) -> int:
    capacity = k.shape[2] * (1 if table is None else table.shape[1])
    keys = sum(_lengths(lengths, capacity, q.shape[0]))
    return 2 * 2 * q.shape[1] * q.shape[2] * keys * q.shape[3]


def _block(x: Any, into: Any, out: Any, inputs: int) -> int:
    """Return the operations of a block, from shapes; `inputs` products go into the hidden layer."""
    tokens, width, hidden = x[0], x[1], into[0]
    return 2 * tokens * hidden * (inputs * width + out[0])


@register_flop_formula(_OPS.feed_forward)
def _feed_forward(x: Any, w1: Any, b1: Any, w2: Any, *rest: Any, **_: Any) -> int:
    return _block(x, w1, w2, 1)


@register_flop_formula(_OPS.feed_forward_backward)
def _feed_forward_backward(dy: Any, x: Any, w1: Any, b1: Any, w2: Any, *rest: Any, **_: Any) -> int:
    return 2 * _block(x, w1, w2, 1)


@register_flop_formula(_OPS.gated_feed_forward)
def _gated(x: Any, w_gate: Any, w_up: Any, w_down: Any, *rest: Any, **_: Any) -> int:
    return _block(x, w_gate, w_down, 2)


@register_flop_formula(_OPS.gated_feed_forward_backward)
def _gated_backward(dy: Any, x: Any, gate: Any, up: Any, down: Any, *rest: Any, **_: Any) -> int:
    return 2 * _block(x, gate, down, 2)


@register_flop_formula(_OPS.linear_cross_entropy)
def _cross_entropy(hidden: Any, weight: Any, *rest: Any, **_: Any) -> int:
    # The gradients are formed beside the loss where they are asked for.
    compute_grads = rest[7]
    return 2 * hidden[0] * hidden[1] * weight[0] * (3 if compute_grads else 1)


@register_flop_formula(_OPS.linear_cross_entropy_backward)
def _cross_entropy_backward(dloss: Any, hidden: Any, weight: Any, *rest: Any, **_: Any) -> int:
    return 3 * 2 * hidden[0] * hidden[1] * weight[0]


@register_flop_formula([_OPS.add_norm, _OPS.add_norm_backward, _OPS.rotary, _OPS.rotary_inplace])
def _elementwise(*arguments: Any, **_: Any) -> int:
    return 0
