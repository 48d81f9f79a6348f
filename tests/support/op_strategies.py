"""Calls of every public op for hypothesis: sizes, layouts, magnitudes and options, drawn together.

A case is a `Call`: the tensors as an op gets them, in memory of any kind, and what calls it. Memory
between the elements of a tensor, and before and behind it, holds what must not be read: NaN, or
integers that lead out of bounds.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

import fuseformer as ff

Tensors = dict[str, Tensor]


@dataclass
class Call:
    """A call of a public op: `run` takes the tensors and a backend, and returns results."""

    op: str
    run: Callable[[Tensors, str], tuple[Tensor, ...]]
    floats: Tensors  # these have gradients
    others: Tensors = field(default_factory=dict)
    note: str = ""  # options that are not tensors
    trains: bool = True

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(str(self))

    def __str__(self) -> str:
        tensors = [
            f"{name}={str(x.dtype).removeprefix('torch.')}{tuple(x.shape)}"
            f"/{x.stride()}+{x.storage_offset()}"
            for name, x in (self.floats | self.others).items()
        ]
        return f"{self.op}({', '.join(tensors)}; {self.note})"


# ------------------------------------------------------------------------------------------------
# Layouts
# ------------------------------------------------------------------------------------------------

#: With a last stride of 1, and without.
ROWS = ("contiguous", "offset", "sliced", "swapped", "expanded")
ANY = (*ROWS, "columns", "strided")


def _filled(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return memory that nobody may read."""
    if dtype.is_floating_point:
        return torch.full(shape, math.nan, dtype=dtype)
    return torch.full(shape, True if dtype == torch.bool else 2**30, dtype=dtype)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """Return `x` in other memory; "expanded" repeats its first slice, which changes the values."""
    dims = x.dim()
    if layout == "contiguous" or x.numel() == 0:
        return x
    if layout == "offset":
        memory = _filled((x.numel() + 6,), x.dtype)[3 : x.numel() + 3]
        return memory.view(x.shape).copy_(x)
    if layout == "expanded" and dims > 0:
        return x[:1].expand(x.shape)
    if layout == "sliced":
        memory = _filled(tuple(n + 2 for n in x.shape), x.dtype)
        return memory[tuple(slice(1, n + 1) for n in x.shape)].copy_(x)
    if layout == "strided" or dims == 1:
        memory = _filled((*x.shape, 2), x.dtype) if dims else _filled((2,), x.dtype)
        return memory[..., 1].copy_(x)
    if layout == "swapped" and dims > 2:
        return x.transpose(-3, -2).contiguous().transpose(-3, -2)
    if layout == "columns" and dims > 1:
        return x.mT.contiguous().mT
    return x


# ------------------------------------------------------------------------------------------------
# Values
# ------------------------------------------------------------------------------------------------

SIZES = {"tiny": 1e-3, "ordinary": 1.0, "large": 30.0}


class Drawn:
    """Draws a case's parts; values come from a generator whose seed is drawn too."""

    def __init__(self, draw: Callable[[Any], Any], dtype: torch.dtype) -> None:
        self.draw, self.dtype = draw, dtype
        self.generator = torch.Generator().manual_seed(self.draw(st.integers(0, 2**20)))
        self.notes: list[str] = []

    def one_of(self, *choices: Any) -> Any:
        return self.draw(st.sampled_from(choices))

    def option(self, name: str, *choices: Any) -> Any:
        value = self.one_of(*choices)
        self.notes.append(f"{name}={value}")
        return value

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def floats(
        self,
        *shape: int,
        layouts: tuple[str, ...] = ANY,
        sizes: tuple[str, ...] = ("tiny", "ordinary", "ordinary", "large"),
        factor: float = 1.0,
    ) -> Tensor:
        """Return values of one magnitude, in one layout and the dtype of the case."""
        x = self.randn(*shape) * (SIZES[self.one_of(*sizes)] * factor)
        return laid_out(x.to(self.dtype), self.one_of(*layouts))

    def integers(self, values: list[int], dtype: torch.dtype) -> Tensor:
        return laid_out(torch.tensor(values, dtype=dtype), self.one_of(*ANY))

    def many(self, values: tuple[Any, ...], count: int) -> list[Any]:
        return self.draw(st.lists(st.sampled_from(values), min_size=count, max_size=count))


# ------------------------------------------------------------------------------------------------
# Attention
# ------------------------------------------------------------------------------------------------

#: What compiled kernels are specialised on: a few sets, in which the options meet.
_NARROW: list[dict[str, Any]] = [
    {},
    {"causal": True, "lengths": True, "dropout_p": 0.3},
    {"causal": "bottom_right", "window": (9, 0), "padding": True, "sinks": True},
    {"bias": (1, 1, 1, 1), "softcap": 5.0, "lengths": True},
    {"bias": (0, 1, 0, 1), "alibi": True, "causal": True, "dropout_p": 0.3},
]
_NARROW_CUDA: list[dict[str, Any]] = [
    {},
    {"causal": True, "lengths": True, "dropout_p": 0.3},
    {"causal": "bottom_right", "window": (9, 0)},
]


def _options(d: Drawn, backend: str, packed: bool) -> dict[str, Any]:
    if backend in ("triton", "cuda"):
        chosen = dict(d.one_of(*(_NARROW if backend == "triton" else _NARROW_CUDA)))
    else:
        chosen = {
            "causal": d.one_of(False, True, "bottom_right"),
            "window": d.one_of(None, None, (0, 0), (3, -1), (9, 2), (-1, 2**31)),
            "lengths": d.one_of(False, True),
            "padding": d.one_of(False, False, True),
            "softcap": d.one_of(None, None, 5.0, 1e6),
            "alibi": d.one_of(False, True),
            "sinks": d.one_of(False, True),
            "dropout_p": d.one_of(0.0, 0.0, 0.3, 1.0),
            "bias": d.one_of(None, None, (1, 1, 1, 1), (0, 1, 0, 1), (0, 0, 0, 0), "1d", "0d"),
        }
    if packed:
        chosen.pop("padding", None), chosen.pop("lengths", None)
    return chosen


def _bias(d: Drawn, backend: str, kept: Any, full: tuple[int, ...]) -> Tensor:
    if kept == "0d":
        return d.floats(layouts=("contiguous",))
    shape = (
        full[-1:] if kept == "1d" else tuple(n if k else 1 for n, k in zip(full, kept, strict=True))
    )
    kinds = ("ordinary", "ordinary", "large")
    if backend in ("reference", "cpu"):  # rows of huge numbers are not yet right on Triton
        kinds = (*kinds, "least places", "least rows", "most")
    kind = d.option("bias", *kinds)
    x = d.randn(*shape) * (30 if kind == "large" else 1)
    if kind == "least rows" and x.dim() > 1:
        x[..., : (x.shape[-2] + 1) // 2, :] = -torch.inf
    elif kind == "least places":
        x[torch.rand(shape, generator=d.generator) < 0.3] = -torch.inf
    elif kind == "most":
        x[torch.rand(shape, generator=d.generator) < 0.1] = torch.inf
    info = torch.finfo(d.dtype)
    x = x.to(d.dtype).clamp(info.min, info.max)
    return laid_out(x, d.one_of(*ANY))


def _head_options(
    d: Drawn, backend: str, chosen: dict[str, Any], heads: int, full: tuple[int, ...]
) -> tuple[Tensors, Tensors, dict[str, Any]]:
    """Return floating tensors, others, and the arguments that are no tensors."""
    floats: Tensors = {}
    others: Tensors = {}
    if chosen.get("bias") is not None:
        floats["bias"] = _bias(d, backend, chosen["bias"], full)
    if chosen.get("sinks"):
        floats["sinks"] = d.floats(heads, sizes=("ordinary", "large"))
    if chosen.get("alibi"):
        slopes = d.randn(heads).abs() * d.one_of(0.01, 1.0, 100.0)
        others["alibi_slopes"] = laid_out(slopes, d.one_of(*ANY))
    plain = {name: chosen[name] for name in ("causal", "window", "softcap") if chosen.get(name)}
    scale = d.one_of(None, None, None, 0.02, 3.0)
    if scale is not None and "causal" not in plain:
        plain["scale"] = scale
    if chosen.get("dropout_p"):
        plain |= {"dropout_p": chosen["dropout_p"], "seed": 3}
    return floats, others, plain


def _dims(d: Drawn, backend: str) -> tuple[tuple[int, int], int]:
    if backend == "cuda":
        return d.one_of((2, 2), (4, 2)), d.one_of(32, 64)
    return d.one_of((2, 2), (4, 2), (3, 1)), d.one_of(8, 24, 40) if backend != "triton" else 24


def _lengths(d: Drawn, batch: int, longest: int) -> Tensor:
    choices = (0, 1, longest // 2, max(0, longest - 1), longest, longest + 7)
    dtype = d.one_of(torch.int32, torch.int64)
    if dtype == torch.int64:
        choices = (*choices, 2**31, 2**40)
    return d.integers(d.many(choices, batch), dtype)


def _in_units(d: Drawn, heads: tuple[int, int], rows: tuple[int, int], head_dim: int, packed: bool):
    """Return q, k and v; logits stay within a few hundreds, values are of any magnitude."""

    def shape(count: int, n: int, batch: int) -> tuple[int, ...]:
        return (n, count, head_dim) if packed else (batch, count, n, head_dim)

    batch = d.one_of(0, 1, 2, 2, 3) if not packed else 0
    q = d.floats(*shape(heads[0], rows[0], batch), layouts=ROWS)
    k = d.floats(*shape(heads[1], rows[1], batch), layouts=ROWS)
    v = d.floats(*shape(heads[1], rows[1], batch), layouts=ROWS)
    return q, k, v, batch


def attention(draw: Callable[[Any], Any], dtype: torch.dtype, backend: str) -> Call:
    d = Drawn(draw, dtype)
    heads, head_dim = _dims(d, backend)
    rows = (d.one_of(0, 1, 5, 17, 33, 70), d.one_of(0, 1, 5, 17, 33, 70))
    q, k, v, batch = _in_units(d, heads, rows, head_dim, packed=False)
    chosen = _options(d, backend, packed=False)
    floats, others, plain = _head_options(d, backend, chosen, heads[0], (batch, heads[0], *rows))
    if chosen.get("padding"):
        padding = torch.rand(batch, rows[1], generator=d.generator) < d.one_of(0.0, 0.4, 1.0)
        others["key_padding_mask"] = laid_out(padding, d.one_of(*ANY))
    if chosen.get("lengths"):
        others["key_lengths"] = _lengths(d, batch, rows[1])

    def run(tensors: Tensors, backend: str) -> tuple[Tensor, ...]:
        return ff.attention(**tensors, **plain, return_lse=True, backend=backend)

    return Call("attention", run, {"q": q, "k": k, "v": v} | floats, others, f"{plain}")


def varlen_attention(draw: Callable[[Any], Any], dtype: torch.dtype, backend: str) -> Call:
    d = Drawn(draw, dtype)
    heads, head_dim = _dims(d, backend)
    count = d.one_of(0, 1, 3)
    queries, keys = (d.many((0, 1, 5, 17, 40), count) for _ in range(2))
    q, k, v, _ = _in_units(d, heads, (sum(queries), sum(keys)), head_dim, packed=True)
    longest = max(queries, default=0) + d.one_of(0, 3), max(keys, default=0) + d.one_of(0, 3)
    chosen = _options(d, backend, packed=True)
    floats, others, plain = _head_options(d, backend, chosen, heads[0], (count, heads[0], *longest))
    for name, lengths in (("cu_seqlens_q", queries), ("cu_seqlens_k", keys)):
        ends = torch.tensor([0, *lengths]).cumsum(0)
        layout = d.one_of(*(n for n in ANY if n != "expanded"))
        others[name] = laid_out(ends.to(torch.int32), layout)

    def run(tensors: Tensors, backend: str) -> tuple[Tensor, ...]:
        return ff.varlen_attention(
            **tensors,
            max_seqlen_q=longest[0],
            max_seqlen_k=longest[1],
            **plain,
            return_lse=True,
            backend=backend,
        )

    return Call("varlen_attention", run, {"q": q, "k": k, "v": v} | floats, others, f"{plain}")


def decode_attention(draw: Callable[[Any], Any], dtype: torch.dtype, backend: str) -> Call:
    d = Drawn(draw, dtype)
    heads, head_dim = _dims(d, backend)
    batch, new = d.one_of(0, 1, 3), d.one_of(1, 1, 3, 8, 40)
    page, pages = 16, d.one_of(1, 4)
    paged = d.one_of(False, True)
    capacity = page * pages
    others: Tensors = {"cache_lengths": _lengths(d, batch, capacity)}
    if paged:
        order = torch.randperm(batch * pages + 2, generator=d.generator)[: batch * pages]
        table = order.view(batch, pages).to(torch.int32)
        layout = d.one_of(*(n for n in ANY if n != "expanded"))
        others["block_table"] = laid_out(table, layout)
    shape = (batch * pages + 2, heads[1], page, head_dim) if paged else None
    shape = shape or (batch, heads[1], capacity, head_dim)
    q = d.floats(batch, heads[0], new, head_dim, layouts=ROWS)
    k, v = (d.floats(*shape, layouts=ROWS[:-1]) for _ in range(2))
    if not paged:  # what nobody may read
        for b, length in enumerate(others["cache_lengths"].tolist()):
            k[b, :, length:], v[b, :, length:] = torch.nan, torch.nan
    narrow = [{}, {"window": (9, 0), "sinks": True}, {"softcap": 5.0, "alibi": True}]
    chosen = dict(d.one_of(*(narrow[: 1 if backend == "cuda" else 3])))
    floats, more, plain = _head_options(d, backend, chosen, heads[0], ())

    def run(tensors: Tensors, backend: str) -> tuple[Tensor, ...]:
        return ff.decode_attention(**tensors, **plain, return_lse=True, backend=backend)

    floats = {"q": q, "k_cache": k, "v_cache": v} | floats
    return Call("decode_attention", run, floats, others | more, f"{plain}", trains=False)


def attention_weights(draw: Callable[[Any], Any], dtype: torch.dtype, backend: str) -> Call:
    d = Drawn(draw, dtype)
    call = attention(draw, dtype, "cpu")
    call.floats.pop("sinks", None)
    heads = d.one_of(None, [0], [1, 0])
    rows = d.one_of(None, [0]) if call.floats["q"].shape[2] else None
    inner = call.run

    def run(tensors: Tensors, backend: str) -> tuple[Tensor, ...]:
        _, lse = inner(tensors, backend)
        options = {
            name: value for name, value in _plain_of(inner).items() if name not in _OF_OUTPUT
        }
        tensors = {name: x for name, x in tensors.items() if name != "v"}
        return (ff.attention_weights(**tensors, lse=lse, heads=heads, rows=rows, **options),)

    return Call("attention_weights", run, call.floats, call.others, call.note, trains=False)


_OF_OUTPUT = ("dropout_p", "seed")


def _plain_of(run: Any) -> dict[str, Any]:
    """Return the arguments without tensors of a call of attention."""
    names = run.__code__.co_freevars
    return run.__closure__[names.index("plain")].cell_contents


# ------------------------------------------------------------------------------------------------
# The rest
# ------------------------------------------------------------------------------------------------


def _rows(d: Drawn) -> tuple[int, ...]:
    return d.one_of((0,), (1,), (19,), (2, 17), (3, 0), (1, 70))


def _blocks(d: Drawn, backend: str) -> tuple[int, int, int, str, dict[str, Any]]:
    widths = (
        d.one_of((16, 40, 24), (64, 32, 64))
        if backend in ("triton", "cuda")
        else d.one_of((16, 40, 24), (1, 7, 3), (64, 32, 64))
    )
    activation = d.one_of("relu", "gelu") if backend == "triton" else d.one_of(*ACTIVATIONS)
    p = d.one_of(0.0, 0.0, 0.3)
    options = {"activation": activation} | ({"dropout_p": p, "seed": 3} if p else {})
    return *widths, activation, options


ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu")
_ORDINARY = ("tiny", "ordinary", "ordinary")


def feed_forward(draw: Callable[[Any], Any], dtype: torch.dtype, backend: str) -> Call:
    d = Drawn(draw, dtype)
    width, hidden, out, _, options = _blocks(d, backend)
    floats = {
        "x": d.floats(*_rows(d), width),
        "w1": d.floats(hidden, width, factor=width**-0.5),
        "w2": d.floats(out, hidden, factor=hidden**-0.5, sizes=_ORDINARY),
    }
    with_biases = d.one_of(True, True, False)
    if with_biases:
        floats |= {"b1": d.floats(hidden), "b2": d.floats(out)}

    def run(tensors: Tensors, backend: str) -> tuple[Tensor, ...]:
        biases = {} if with_biases else {"b1": None, "b2": None}
        return (ff.feed_forward(**tensors, **biases, **options, backend=backend),)

    return Call("feed_forward", run, floats, note=f"{options}")


def gated_feed_forward(draw: Callable[[Any], Any], dtype: torch.dtype, backend: str) -> Call:
    d = Drawn(draw, dtype)
    width, hidden, out, _, options = _blocks(d, backend)
    floats = {
        # The hidden layer is kept in the dtype of the call, as in eager PyTorch: it must fit there.
        "x": d.floats(*_rows(d), width, sizes=_ORDINARY),
        "w_gate": d.floats(hidden, width, factor=width**-0.5),
        "w_up": d.floats(hidden, width, factor=width**-0.5, sizes=_ORDINARY),
        "w_down": d.floats(out, hidden, factor=hidden**-0.5, sizes=_ORDINARY),
    }

    def run(tensors: Tensors, backend: str) -> tuple[Tensor, ...]:
        return (ff.gated_feed_forward(**tensors, **options, backend=backend),)

    return Call("gated_feed_forward", run, floats, note=f"{options}")


def _norm(draw: Callable[[Any], Any], dtype: torch.dtype, backend: str, rms: bool) -> Call:
    d = Drawn(draw, dtype)
    rows, width = _rows(d), d.one_of(8, 72) if backend == "triton" else d.one_of(1, 8, 72)
    floats = {"x": d.floats(*rows, width), "residual": d.floats(*rows, width)}
    floats["weight"] = d.floats(width)
    if not rms:
        floats["bias"] = d.floats(width)
    p = d.one_of(0.0, 0.0, 0.3)
    options = {"eps": 1e-5, "return_residual": d.one_of(True, False)}
    options |= {"dropout_p": p, "seed": 3} if p else {}

    def run(tensors: Tensors, backend: str) -> tuple[Tensor, ...]:
        op = ff.add_rms_norm if rms else ff.add_layer_norm
        results = op(**tensors, **options, backend=backend)
        return results if isinstance(results, tuple) else (results,)

    return Call("add_rms_norm" if rms else "add_layer_norm", run, floats, note=f"{options}")


def add_layer_norm(draw: Callable[[Any], Any], dtype: torch.dtype, backend: str) -> Call:
    return _norm(draw, dtype, backend, rms=False)


def add_rms_norm(draw: Callable[[Any], Any], dtype: torch.dtype, backend: str) -> Call:
    return _norm(draw, dtype, backend, rms=True)


def linear_cross_entropy(draw: Callable[[Any], Any], dtype: torch.dtype, backend: str) -> Call:
    d = Drawn(draw, dtype)
    rows, width, words = _rows(d), 24, d.one_of(101, 40)
    floats = {
        "hidden": d.floats(*rows, width, sizes=("tiny", "ordinary")),
        "weight": d.floats(words, width, factor=width**-0.5),
    }
    if d.one_of(False, True):
        floats["bias"] = d.floats(words)
    target = torch.randint(words, rows, generator=d.generator)
    target[torch.rand(rows, generator=d.generator) < d.one_of(0.0, 0.5, 1.0)] = -100
    options = {
        "label_smoothing": d.one_of(0.0, 0.1),
        "softcap": d.one_of(None, 8.0),
        "z_loss": d.one_of(0.0, 1e-2),
        "reduction": d.one_of("sum", "none", "mean"),
    }

    def run(tensors: Tensors, backend: str) -> tuple[Tensor, ...]:
        return (ff.linear_cross_entropy(**tensors, **options, backend=backend),)

    others = {"target": laid_out(target, d.one_of(*ANY))}
    return Call("linear_cross_entropy", run, floats, others, note=f"{options}")


def rotary(draw: Callable[[Any], Any], dtype: torch.dtype, backend: str) -> Call:
    d = Drawn(draw, dtype)
    batch, rows, width = d.one_of(0, 1, 3), d.one_of(0, 1, 17, 33), d.one_of(8, 24)
    half = d.one_of(width // 2, width // 4)
    floats = {
        "q": d.floats(batch, 4, rows, width, layouts=ROWS),
        "k": d.floats(batch, 2, rows, width, layouts=ROWS),
    }
    angle = torch.arange(float(rows))[:, None] / torch.arange(1.0, half + 1)
    if d.one_of(False, True):
        angle = angle.expand(batch, rows, half)
    others = {"cos": angle.cos().to(dtype), "sin": angle.sin().to(dtype)}
    others = {name: laid_out(x.contiguous(), d.one_of(*ANY)) for name, x in others.items()}
    options = {"interleaved": d.one_of(False, True)}

    def run(tensors: Tensors, backend: str) -> tuple[Tensor, ...]:
        return ff.rotary(**tensors, **options, backend=backend)

    return Call("rotary", run, floats, others, note=f"{options}")


MAKERS = {
    make.__name__: make
    for make in (
        attention,
        varlen_attention,
        decode_attention,
        attention_weights,
        feed_forward,
        gated_feed_forward,
        add_layer_norm,
        add_rms_norm,
        linear_cross_entropy,
        rotary,
    )
}


def calls(op: str, backend: str) -> st.SearchStrategy[Call]:
    """Return a strategy of calls of `op` that suit what `backend` is compiled for."""
    dtypes = [torch.bfloat16, torch.float16, torch.float32][: 2 if backend == "cuda" else 3]

    @st.composite
    def made(draw: Callable[[Any], Any]) -> Call:
        return MAKERS[op](draw, draw(st.sampled_from(dtypes)), backend)

    return made()
