"""One HTML page that shows a run: numbers, pictures, answers. It needs no other file."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from fuseformer.files import write_atomically
from fuseformer.tuning.attention_map import AttentionMap
from fuseformer.tuning.comparison import Comparison
from fuseformer.tuning.evaluation import Evaluation
from fuseformer.tuning.plots import attention_picture, bars, loss_curves

LOWER_IS_BETTER = ("perplexity",)


@dataclass(frozen=True)
class Row:
    """A metric of a task before and after tuning, and the recurrent baseline's where it has one."""

    task: str
    metric: str
    before: float
    after: float
    baseline: float | None = None

    @property
    def verdict(self) -> str:
        """What tuning did to it: "better", "worse" or "same"."""
        if self.after == self.before:
            return "same"
        lower = self.metric in LOWER_IS_BETTER
        return "better" if (self.after < self.before) == lower else "worse"


@dataclass(frozen=True)
class Example:
    """A held-out record with what both models answered."""

    task: str
    prompt: str
    wanted: str
    before: str
    after: str


def comparison_rows(
    before: Evaluation, after: Evaluation, baseline_accuracy: Mapping[str, float]
) -> list[Row]:
    """Return a row for each task and metric; the baseline's accuracies come by task."""
    return [
        Row(
            task,
            metric,
            before.metrics[task][metric],
            value,
            baseline_accuracy.get(task) if metric == "accuracy" else None,
        )
        for task, metrics in after.metrics.items()
        for metric, value in metrics.items()
    ]


def table(rows: Sequence[Row]) -> str:
    """Return the rows as aligned text."""
    lines = [f"{'task':20} {'metric':12} {'pretrained':>11} {'tuned':>9} {'LSTM':>7}"]
    for row in rows:
        baseline = "" if row.baseline is None else f"{row.baseline:.1f}"
        lines.append(
            f"{row.task:20} {row.metric:12} {row.before:11.1f} {row.after:9.1f} {baseline:>7}"
            f"  {row.verdict}"
        )
    return "\n".join(lines)


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:,.1f}"


def _embedded(png: bytes) -> str:
    return base64.b64encode(png).decode("ascii")


def write_report(
    path: Path,
    *,
    title: str,
    summary: str,
    counts: str,
    rows: Sequence[Row],
    curves: Mapping[str, Sequence[float]],
    examples: Sequence[Example],
    attention: AttentionMap,
    comparison: Comparison,
    facts: Sequence[tuple[str, str]],
) -> None:
    """Write the page whole or not at all; raises `OSError` where it cannot be written."""
    import jinja2

    source = files("fuseformer.tuning").joinpath("report.html").read_text(encoding="utf-8")
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
        source
    )
    share = comparison.padded_tokens / comparison.tokens
    timing = (
        f"Forward and backward of one batch of tuning records, in float32 on this machine: "
        f"{comparison.speedup:.2f} times as fast on packed tokens through fuseformer as on padded "
        f"ones through torch.nn, with the same weights and the same loss. The batch has "
        f"{comparison.tokens:,} tokens ({comparison.supervised:,} of them supervised), and "
        f"{share:.2f} times as many once padded."
    )
    page = template.render(
        title=title,
        summary=summary,
        counts=counts,
        rows=[
            {
                "task": row.task.replace("_", " "),
                "metric": row.metric.replace("_", " "),
                "before": _figure(row.before),
                "after": _figure(row.after),
                "baseline": _figure(row.baseline),
                "verdict": row.verdict,
            }
            for row in rows
        ],
        loss_png=_embedded(loss_curves(curves)),
        examples=examples,
        attention=attention,
        attention_png=_embedded(attention_picture(attention)),
        timing=timing,
        timing_png=_embedded(
            bars(
                {
                    "torch.nn, padded": comparison.plain_seconds * 1e3,
                    "fuseformer, packed": comparison.fused_seconds * 1e3,
                },
                "milliseconds of a forward and backward (median)",
            )
        ),
        decisions=comparison.decisions,
        facts=facts,
    )
    write_atomically(path, lambda file: file.write(page.encode("utf-8")))
