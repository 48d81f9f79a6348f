"""Hypothesis strategies: a call of a block, norm, loss or rotary, with tensors in any layout.

Sizes and options that are constants of a kernel come from short lists, so that few kernels are
compiled. Memory that a view does not show holds NaN, or in integers a number far out of range.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

import fuseformer as ff

LAYOUTS = ("contiguous", "transposed", "strided", "offset", "expanded")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAGNITUDES = (1e-4, 1.0, 8.0)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """Return a view of the shape of `x`, with its values unless expanded, in a `layout`."""
    if x.dim() == 0 or x.numel() == 0 or layout == "contiguous":
        return x.clone()
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "expanded":
        return x[:1].clone().expand(x.shape)
    hidden = float("nan") if x.is_floating_point() else torch.iinfo(x.dtype).max
    if layout == "strided":
        room = x.new_full((*x.shape, 2), hidden)
        room[..., 0] = x
        return room[..., 0]
    room = x.new_full([n + 2 for n in x.shape], hidden)
    view = room[tuple(slice(1, -1) for _ in x.shape)]
    return view.copy_(x)


@dataclass
class DrawnCall:
    """An op, its floating tensors, and the rest; `words` say what was drawn."""

    op: str
    floats: dict[str, Tensor]
    others: dict[str, Any]
    words: list[str] = field(default_factory=list)

    def run(self, floats: dict[str, Tensor], backend: str) -> tuple[Tensor, ...]:
        result = getattr(ff, self.op)(**floats, **self.others, backend=backend)
        return result if isinstance(result, tuple) else (result,)

    def __repr__(self) -> str:
        shown = {k: v.tolist() if isinstance(v, Tensor) else v for k, v in self.others.items()}
        return f"{self.op}({', '.join(self.words)}; {shown})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))


class Drawer:
    """Draws tensors and options of one call, and notes them."""

    def __init__(self, draw: Callable[[Any], Any]) -> None:
        self.draw, self.words = draw, []
        self.generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
        self.dtype = self.one("dtype", DTYPES)

    def one(self, name: str, values: Any) -> Any:
        value = self.draw(st.sampled_from(values))
        self.words.append(f"{name}={str(value).removeprefix('torch.')}")
        return value

    def floats(self, name: str, *shape: int, size: float = 1.0, dtype: Any = None) -> Tensor:
        values = torch.randn(shape, generator=self.generator) * size
        layout = self.one(f"{name}{list(shape)}", LAYOUTS)
        return laid_out(values.to(dtype or self.dtype), layout)

    def integers(self, name: str, values: list[int], dtype: torch.dtype) -> Tensor:
        layouts = [x for x in LAYOUTS if x != "expanded" or len(set(values)) == 1]
        return laid_out(torch.tensor(values, dtype=dtype), self.one(name, layouts))


def _feed_forward(d: Drawer, gated: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tokens, width, hidden = d.one("sizes", [(1, 40, 72), (33, 40, 72), (19, 264, 72)])
    size = d.one("size", MAGNITUDES)
    x = d.floats("x", tokens, width, size=size)
    options: dict[str, Any] = {"activation": d.one("activation", ("relu", "gelu", "silu"))}
    if d.one("dropout", (False, True)):
        options |= {"dropout_p": 0.25, "seed": 3}
    first = [d.floats(f"w{i}", hidden, width, size=width**-0.5) for i in range(1 + gated)]
    last = d.floats("w2", width, hidden, size=hidden**-0.5)
    if gated:
        return {"x": x, "w_gate": first[0], "w_up": first[1], "w_down": last}, options
    b1, b2 = d.floats("b1", hidden), d.floats("b2", width)
    return {"x": x, "w1": first[0], "b1": b1, "w2": last, "b2": b2}, options


def _norm(d: Drawer, rms: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    shape = (d.one("rows", (1, 17, 33)), d.one("width", (40, 72)))
    size = d.one("size", MAGNITUDES)
    tensors = {name: d.floats(name, *shape, size=size) for name in ("x", "residual")}
    names = ("weight",) if rms else ("weight", "bias")
    dtype = d.one("parameters", (d.dtype, torch.float32))
    tensors |= {name: d.floats(name, shape[1], dtype=dtype) for name in names}
    options: dict[str, Any] = {"eps": 1e-5}
    if d.one("dropout", (False, True)):
        options |= {"dropout_p": 0.25, "seed": 3}
    return tensors, options


def _loss(d: Drawer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    rows, classes = d.one("rows", (1, 5, 40)), d.one("classes", (1, 50))
    tensors = {
        "hidden": d.floats("hidden", rows, 24, size=d.one("size", MAGNITUDES)),
        "weight": d.floats("weight", classes, 24, size=d.one("weights", (1e-3, 0.2))),
    }
    if d.one("biased", (False, True)):
        tensors["bias"] = d.floats("bias", classes)
    target = d.draw(st.lists(st.sampled_from([-100, 0, classes - 1]), min_size=rows, max_size=rows))
    options: dict[str, Any] = {"target": d.integers("target", target, torch.int64)}
    counted = sum(t != -100 for t in target)
    options["max_supervised"] = d.one("bound", (None, counted, counted + 3))
    reductions = ("mean", "sum", "none") if counted else ("sum", "none")
    options["reduction"] = d.one("reduction", reductions)
    if d.one("smooth", (False, True)):
        options |= {"label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 20.0}
    return tensors, options


def _rotary(d: Drawer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    length = d.one("length", (1, 33))
    size = d.one("size", (*MAGNITUDES, 1e4))
    tensors = {
        name: d.floats(name, 2, h, length, 24, size=size) for name, h in (("q", 4), ("k", 2))
    }
    half = d.one("half", (4, 12))
    lead = d.one("lead", ((), (2,)))
    angle = torch.rand(*lead, length, half, generator=d.generator) * 6
    tables = {
        name: laid_out(t.to(d.dtype), d.one(name, LAYOUTS))
        for name, t in (("cos", angle.cos()), ("sin", angle.sin()))
    }
    return tensors, {**tables, "interleaved": d.one("interleaved", (False, True))}


MAKERS: dict[str, Callable[[Drawer], tuple[dict[str, Tensor], dict[str, Any]]]] = {
    "feed_forward": lambda d: _feed_forward(d, False),
    "gated_feed_forward": lambda d: _feed_forward(d, True),
    "add_layer_norm": lambda d: _norm(d, False),
    "add_rms_norm": lambda d: _norm(d, True),
    "linear_cross_entropy": _loss,
    "rotary": _rotary,
}


@st.composite
def drawn_calls(draw: Callable[[Any], Any], op: str) -> DrawnCall:
    """Draw a call of `op`."""
    drawer = Drawer(draw)
    floats, others = MAKERS[op](drawer)
    return DrawnCall(op, floats, others, drawer.words)
