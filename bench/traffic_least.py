"""The least that a launch can ask of global memory with the tiles it has, in bytes.

Inputs and outputs count once, and what each program needs to itself once a program: for attention k
and v once a query block, as far as it sees them, and in the dk/dv pass q, dout, lse and delta once
a key block; for norms the weights once a program; for the resident feed-forward once a block of
rows. The loss reads its logits twice and writes them once.
"""

from collections.abc import Callable, Iterator
from math import prod
from typing import Any

import triton

Arguments = dict[str, Any]


def _size(arguments: Arguments, *names: str) -> int:
    """Return the bytes of tensors, 0 for those that are None."""
    tensors = [arguments[f"{name}_ptr"] for name in names]
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def _overlap(
    arguments: Arguments, rows_of: str, block: int, lengths: list[int]
) -> Iterator[tuple[int, int]]:
    """Yield, for each block of queries (or keys) of a head, its rows and what they see.

    A pair (rows, others): a row sees the columns from `row + diagonal - left` to `row + diagonal +
    right`; for a block of keys the roles are reversed.
    """
    queries, keys = arguments["seqlen_q"], arguments["seqlen_k"]
    unbounded = queries + keys
    left, right = (arguments[f"window_{side}"] for side in ("left", "right"))
    left, right = (unbounded if bound is None else bound for bound in (left, right))
    if rows_of == "k":
        left, right = right, left
    for end in lengths:
        diagonal = end - queries if arguments["BOTTOM_RIGHT"] else 0
        diagonal = -diagonal if rows_of == "k" else diagonal
        rows, others = (queries, end) if rows_of == "q" else (end, queries)
        for start in range(0, queries if rows_of == "q" else keys, block):
            last = min(start + block, rows) - 1
            first_seen = max(0, start + diagonal - left)
            last_seen = min(others - 1, last + diagonal + right)
            yield max(0, last - start + 1), max(0, last_seen - first_seen + 1)


def _lengths(arguments: Arguments) -> list[int]:
    batch, keys = arguments["k_ptr"].shape[0], arguments["seqlen_k"]
    if arguments["key_lengths"] is None:
        return [keys] * batch
    return arguments["key_lengths"].clamp(0, keys).tolist()


def _bias_item(arguments: Arguments) -> int:
    """Return the bytes that a bias takes for each pair of a query and a key."""
    return 0 if arguments["bias_ptr"] is None else arguments["bias_ptr"].element_size()


def _query_blocks(arguments: Arguments, once: tuple[str, ...], row_bytes: int) -> int:
    """Return the least of a kernel that owns query blocks: `once` whole, k and v as seen."""
    heads, item = arguments["heads"], arguments["q_ptr"].element_size()
    width = arguments["HEAD_DIM"] * item
    total = _size(arguments, *once) + row_bytes * prod(arguments["q_ptr"].shape[:3])
    pairs = _bias_item(arguments)
    for rows, keys in _overlap(arguments, "q", arguments["BLOCK_M"], _lengths(arguments)):
        total += heads * (2 * keys * width + rows * keys * pairs)
    return total


def _attention_forward(arguments: Arguments, programs: int) -> int:
    return _query_blocks(arguments, ("q", "out"), 4)


def _attention_query_gradient(arguments: Arguments, programs: int) -> int:
    return _query_blocks(arguments, ("q", "dout", "dq"), 8)


def _attention_key_gradient(arguments: Arguments, programs: int) -> int:
    heads, group, item = arguments["heads"], arguments["GROUP"], arguments["q_ptr"].element_size()
    width = arguments["HEAD_DIM"] * item
    total, pairs = _size(arguments, "dk", "dv"), _bias_item(arguments)
    for keys, queries in _overlap(arguments, "k", arguments["BLOCK_N"], _lengths(arguments)):
        total += heads // group * 2 * keys * width
        total += heads * queries * (2 * width + 8 + keys * pairs)
    return total


def _once(*names: str, per_program: tuple[str, ...] = ()) -> Callable[[Arguments, int], int]:
    def least(arguments: Arguments, programs: int) -> int:
        return _size(arguments, *names) + programs * _size(arguments, *per_program)

    return least


def _add_norm_gradient(arguments: Arguments, programs: int) -> int:
    moved = ("dy", "dtotal", "x", "residual", "mean", "rstd", "dx", "dresidual", "dweight", "dbias")
    return _size(arguments, *moved) + arguments["items"] * _size(arguments, "weight")


def _cross_entropy(arguments: Arguments, programs: int) -> int:
    passes = arguments["COMPUTE_LOSS"] + 2 * arguments["WRITE_GRADIENT"]
    return passes * _size(arguments, "logits") + _size(arguments, "target", "lse", "loss")


def _linear_activation(arguments: Arguments, programs: int) -> int:
    rows = triton.cdiv(arguments["tokens"], arguments["BLOCK_M"])
    moved = _size(arguments, "pre", "act") + rows * _size(arguments, "w", "b")
    return moved + programs // rows * _size(arguments, "x")


def _decode_parts(arguments: Arguments) -> list[tuple[int, int]]:
    """Return, for each sequence, the keys that its rows see and the parts they are split into."""
    block, window, found = arguments["BLOCK_N"], arguments["window_left"], []
    for length in arguments["lengths_ptr"].clamp(0, arguments["capacity"]).tolist():
        first = 0 if window is None else max(0, length - arguments["seqlen_q"] - window)
        blocks = triton.cdiv(length - first // block * block, block)
        parts = triton.cdiv(blocks, triton.cdiv(blocks, arguments["splits"])) if blocks else 0
        found.append((length - first, parts))
    return found


def _decode_attention(arguments: Arguments, programs: int) -> int:
    width = arguments["HEAD_DIM"] * arguments["k_ptr"].element_size()
    whole = arguments["splits"] == 1  # then a part is the result
    result = width + 4 if whole else arguments["HEAD_DIM"] * 4 + 4
    rows, total = arguments["heads"] * arguments["seqlen_q"], 0
    for keys, parts in _decode_parts(arguments):
        total += 2 * keys * arguments["k_ptr"].shape[1] * width
        total += max(parts, whole) * rows * (width + result)
    return total


def _decode_merge(arguments: Arguments, programs: int) -> int:
    rows = arguments["heads"] * arguments["seqlen_q"]
    part = rows * (arguments["HEAD_DIM"] + 1) * 4
    merged = sum(parts * part for _, parts in _decode_parts(arguments))
    return merged + _size(arguments, "out", "lse")


def _decode_output(arguments: Arguments, programs: int) -> int:
    blocks = triton.cdiv(arguments["OUT"], arguments["BLOCK_N"])
    return _size(arguments, "w2", "partial") + blocks * _size(arguments, "hidden")


def _rotary(arguments: Arguments, programs: int) -> int:
    rotated = 2 * arguments["HALF"] if arguments["IN_PLACE"] else arguments["HEAD_DIM"]
    moved = 2 * _size(arguments, "q", "k") * rotated // arguments["HEAD_DIM"]
    groups = sum(triton.cdiv(arguments[f"heads_{x}"], arguments["HEADS"]) for x in "qk")
    batch = 1 if arguments["BATCHED"] else arguments["q_ptr"].shape[0]
    return moved + batch * groups * _size(arguments, "cos", "sin")


#: Kernel -> its least, from the arguments of the launch and the number of programs.
LEAST: dict[str, Callable[[Arguments, int], int]] = {
    "attention_forward": _attention_forward,
    "attention_delta": _once("out", "dout", "lse", "dlse", "lse_log2", "delta"),
    "attention_key_gradient": _attention_key_gradient,
    "attention_query_gradient": _attention_query_gradient,
    "add_norm": _once(
        "x", "residual", "y", "total", "mean", "rstd", per_program=("weight", "bias")
    ),
    "add_norm_gradient": _add_norm_gradient,
    "cross_entropy": _cross_entropy,
    "decode_attention": _decode_attention,
    "decode_merge": _decode_merge,
    "feed_forward_resident": _once("x", "y", per_program=("w1", "b1", "w2", "b2")),
    "feed_forward_resident_gradient": _once(
        "dy", "x", "dx", "dpre", "act", "db1", per_program=("w1", "b1", "w2")
    ),
    "gated_feed_forward_resident": _once("x", "y", per_program=("w_gate", "w_up", "w_down")),
    "gated_feed_forward_resident_gradient": _once(
        "dy", "x", "dx", "dgate", "dup", "hidden", per_program=("w_gate", "w_up", "w_down")
    ),
    "gated_activation": _once("pre", "up", "hidden"),
    "gated_activation_gradient": _once("pre", "up", "gradient", "gradient", "dup", "hidden"),
    "decode_hidden": _once("w1", "b1", "w_up", "pre", "up", "hidden", per_program=("x",)),
    "decode_output": _decode_output,
    "decode_sum": lambda a, programs: _size(a, "partial", "y") + a["tokens"] * _size(a, "b2"),
    "rotary": _rotary,
    "linear_activation": _linear_activation,
    "activation": _once("pre", "act"),
    "activation_gradient": _once("pre", "gradient", "gradient", "act", "db1"),
}
