"""The scores that the project asks of its kernels, and what it gets.

A backward pass in several kernels recomputes products. It is counted as its scores, each times the
products in its loop, over the products that one pass needs: 5 for attention, where dk/dv has 4 and
dq 3. A resident feed-forward gradient recomputes nothing that it need not: its score as it is.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .launches import Launch, architecture

Key = tuple[str, int]
Row = dict[str, Any]

#: Tensors that a kernel takes whether or not an option is in use.
_ALWAYS = {"b", "b1", "b2", "db1", "pre", "act", "dx"}


@dataclass(frozen=True)
class Part:
    """The best launch of a kernel in bf16 without options: its score, or its edge loop's ratio."""

    kernel: str
    constants: dict[str, Any] = field(default_factory=dict)
    edge: bool = False
    weight: float = 1.0

    def matches(self, launch: Launch) -> bool:
        return (
            launch.kernel == self.kernel
            and launch.dtype == "bf16"
            and not set(launch.options) - _ALWAYS
            and self.constants.items() <= launch.constants.items()
        )

    def figure(self, row: Row) -> float | None:
        """Return the number of a row, None where it has none."""
        score, edge = row.get("score"), row.get("edge_score")
        if not self.edge:
            return score
        return edge / score if edge and score else None


@dataclass(frozen=True)
class Goal:
    """A number that must not be above `asked`: the sum of its parts, each times its weight."""

    name: str
    capability: int
    asked: float
    parts: tuple[Part, ...]

    def needs(self, launch: Launch, capability: int) -> bool:
        return capability == self.capability and any(part.matches(launch) for part in self.parts)

    def got(self, items: Mapping[Key, Launch], rows: Mapping[Key, Row]) -> float | None:
        """Return the number, or None if one of its parts was not scored."""
        total = 0.0
        for part in self.parts:
            figures = [
                part.figure(row)
                for key, row in rows.items()
                if key[1] == self.capability and part.matches(items[key])
            ]
            best = min((figure for figure in figures if figure is not None), default=None)
            if best is None:
                return None
            total += part.weight * best
        return total


def _attention(name: str, dim: int, **choice: Any) -> Part:
    return Part(f"attention_{name}", {"HEAD_DIM": dim, "GROUP": 1}, **choice)


def _goals() -> list[Goal]:
    goals = [
        Goal(f"attention forward, head dim {dim}", capability, asked, (_attention("forward", dim),))
        for capability, dim, asked in (
            (80, 64, 1.5),
            (80, 128, 1.45),
            (90, 64, 1.6),
            (90, 128, 1.2),
        )
    ]
    for dim, asked in ((64, 1.85), (128, 2.2)):
        kernels = ("key_gradient", 4 / 5), ("query_gradient", 3 / 5)
        parts = tuple(_attention(name, dim, weight=weight) for name, weight in kernels)
        goals.append(Goal(f"attention backward over 5 products, head dim {dim}", 80, asked, parts))
    for kernel in ("forward", "key_gradient", "query_gradient"):
        for dim in (64, 128):
            name = f"edge loop over full loop, {kernel}, head dim {dim}"
            goals.append(Goal(name, 80, 1.5, (_attention(kernel, dim, edge=True),)))
    for kernel, asked in (("", (1.11, 1.15)), ("_gradient", (1.4, 1.4))):
        for width, most in zip((128, 256), asked, strict=True):
            name = f"resident feed-forward{kernel.replace('_', ' ')}, width {width}"
            part = Part(f"feed_forward_resident{kernel}", {"WIDTH": width, "ACTIVATION": "relu"})
            goals.append(Goal(name, 80, most, (part,)))
    for capability, asked in ((80, 1.06), (90, 1.0)):
        goals.append(Goal("matmul with epilogue", capability, asked, (Part("linear_activation"),)))
    return goals


GOALS = _goals()


def needed(launch: Launch, capability: int) -> bool:
    """Return whether a goal is about this launch."""
    return any(goal.needs(launch, capability) for goal in GOALS)


def summary(items: Mapping[Key, Launch], rows: Mapping[Key, Row]) -> str:
    """Return the goals as aligned text; those whose launches were not scored say so."""
    lines = ["", f"{'goal':56}{'':8}{'asked':>7}{'got':>7}"]
    for goal in GOALS:
        got = goal.got(items, rows)
        shown = f"{'-':>7}  not scored" if got is None else f"{got:7.3f}"
        missed = "  missed" if got is not None and got > goal.asked else ""
        lines.append(
            f"{goal.name:56}{architecture(goal.capability):8}{goal.asked:7.2f}{shown}{missed}"
        )
    return "\n".join(lines)
