"""The pictures of a report, as PNG."""

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fuseformer.tuning.attention_map import AttentionMap

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def _figure(width: float, height: float) -> tuple["Figure", Any]:
    # Not pyplot: it keeps figures and chooses a backend for the whole process.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _png(figure: "Figure") -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def running_mean(values: Sequence[float], span: int) -> list[float]:
    """Return the mean of the last `span` values, of fewer at the beginning, at each place."""
    sums, means = [0.0], []
    for value in values:
        sums.append(sums[-1] + value)
    for end in range(1, len(sums)):
        start = max(0, end - span)
        means.append((sums[end] - sums[start]) / (end - start))
    return means


def loss_curves(curves: Mapping[str, Sequence[float]]) -> bytes:
    """Draw the loss of each stage by step, faint, and its running mean."""
    figure, axes = _figure(8, 3.6)
    for index, (name, losses) in enumerate(curves.items()):
        color = f"C{index}"
        steps = range(1, len(losses) + 1)
        axes.plot(steps, losses, color=color, alpha=0.25, linewidth=0.8)
        mean = running_mean(losses, max(1, len(losses) // 30))
        axes.plot(steps, mean, color=color, linewidth=1.8, label=name)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats, as weighted)")
    axes.grid(alpha=0.3)
    axes.legend()
    return _png(figure)


def attention_picture(shown: AttentionMap) -> bytes:
    """Draw a head's probabilities, queries down, keys across, the tokens at both."""
    count = len(shown.tokens)
    size = min(14.0, max(4.0, 0.17 * count + 1.5))
    figure, axes = _figure(size, size)
    # The square root lets faint probabilities show beside strong ones.
    image = axes.imshow(shown.weights.sqrt().numpy(), cmap="magma", vmin=0, vmax=1)
    # The default font has no signs for some scripts, and $ begins its mathematics.
    labels = [
        "".join(c if c.isascii() and c.isprintable() else "?" for c in token).replace("$", r"\$")
        for token in shown.tokens
    ]
    axes.set_xticks(range(count), labels, rotation=90, fontsize=6)
    axes.set_yticks(range(count), labels, fontsize=6)
    axes.set_xlabel("key")
    axes.set_ylabel("query")
    bar = figure.colorbar(image, ax=axes, shrink=0.6, ticks=[0, 0.5, 0.7071, 1])
    bar.ax.set_yticklabels(["0", "0.25", "0.5", "1"])
    bar.set_label("probability")
    return _png(figure)


def bars(values: Mapping[str, float], unit: str) -> bytes:
    """Draw one horizontal bar for each name, with its value."""
    figure, axes = _figure(7, 0.7 + 0.45 * len(values))
    drawn = axes.barh(list(values), list(values.values()), color=["C7", "C0"] * len(values))
    axes.bar_label(drawn, fmt="%.1f", padding=3)
    axes.invert_yaxis()
    axes.set_xlabel(unit)
    axes.margins(x=0.12)
    return _png(figure)
