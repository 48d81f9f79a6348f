"""The scores that the project asks of its kernels, and what it gets.

A backward pass in several kernels recomputes products. It is counted as its scores, each times the
products in its loop, over the products that one pass needs: 5 for attention, where dk/dv has 4 and
dq 3. A resident feed-forward gradient recomputes nothing that it need not: its score as it is.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .launches import Launch

Key = tuple[str, int]


@dataclass(frozen=True)
class Goal:
    """A number that must not be above `asked`; `got` computes it, None if nothing was measured."""

    name: str
    capability: int
    asked: float
    got: Callable[["Measured"], float | None]


class Measured:
    """Rows of one architecture, to be asked for by kernel and constants."""

    def __init__(self, items: dict[Key, Launch], rows: dict[Key, dict[str, Any]], capability: int):
        self._rows = [(items[key], row) for key, row in rows.items() if key[1] == capability]

    def best(self, kernel: str, what: str = "score", **constants: Any) -> float | None:
        """Return the lowest number over the launches of a kernel in bf16 without options."""
        found = [
            row["edge_score"] / row["score"] if what == "ratio" else row[what]
            for launch, row in self._rows
            if launch.kernel == kernel
            and launch.dtype == "bf16"
            and not set(launch.options) - _ALWAYS
            and constants.items() <= launch.constants.items()
            and {"score", "edge_score" if what == "ratio" else what} <= row.keys()
        ]
        return min(found, default=None)


#: Tensors that a kernel takes with or without an option in use.
_ALWAYS = {"b", "b1", "b2", "db1", "pre", "act"}


def _forward(dim: int, what: str = "score") -> Callable[[Measured], float | None]:
    return lambda rows: rows.best("attention_forward", what, HEAD_DIM=dim, GROUP=1)


def _backward(dim: int) -> Callable[[Measured], float | None]:
    def got(rows: Measured) -> float | None:
        keys = rows.best("attention_key_gradient", HEAD_DIM=dim, GROUP=1)
        queries = rows.best("attention_query_gradient", HEAD_DIM=dim, GROUP=1)
        return None if keys is None or queries is None else (4 * keys + 3 * queries) / 5

    return got


def _kernel(kernel: str, what: str = "score", **constants: Any) -> Callable[..., float | None]:
    return lambda rows: rows.best(kernel, what, **constants)


GOALS = (
    Goal("attention forward, head dim 64", 80, 1.50, _forward(64)),
    Goal("attention forward, head dim 128", 80, 1.45, _forward(128)),
    Goal("attention backward over 5 products, head dim 64", 80, 1.85, _backward(64)),
    Goal("attention backward over 5 products, head dim 128", 80, 2.20, _backward(128)),
    *(
        Goal(f"edge over full loop, {kernel}, head dim {dim}", 80, 1.5, _kernel(
            f"attention_{kernel}", "ratio", HEAD_DIM=dim, GROUP=1
        ))
        for kernel in ("forward", "key_gradient", "query_gradient")
        for dim in (64, 128)
    ),
    Goal("attention forward, head dim 64", 90, 1.6, _forward(64)),
    Goal("attention forward, head dim 128", 90, 1.2, _forward(128)),
    *(
        Goal(f"resident feed-forward, width {width}", 80, asked, _kernel(
            "feed_forward_resident", WIDTH=width
        ))
        for width, asked in ((128, 1.11), (256, 1.15))
    ),
    *(
        Goal(f"resident feed-forward backward, width {width}", 80, 1.4, _kernel(
            "feed_forward_resident_gradient", WIDTH=width
        ))
        for width in (128, 256)
    ),
    Goal("epilogue matmul", 80, 1.06, _kernel("linear_activation")),
    Goal("epilogue matmul", 90, 1.0, _kernel("linear_activation")),
)  # fmt: skip


def summary(items: dict[Key, Launch], rows: dict[Key, dict[str, Any]]) -> str:
    """Return the goals as aligned text; those whose launches were not compiled say so."""
    lines = ["", f"{'goal':52}{'':8}{'asked':>7}{'got':>7}"]
    for goal in GOALS:
        got = goal.got(Measured(items, rows, goal.capability))
        shown = f"{'-':>7}  not compiled" if got is None else f"{got:7.3f}"
        missed = "  missed" if got is not None and got > goal.asked else ""
        lines.append(f"{goal.name:52}{f'sm_{goal.capability}':8}{goal.asked:7.2f}{shown}{missed}")
    return "\n".join(lines)
