"""What a benchmark leaves behind: a printed table, a JSON file and a plot."""

import json
import platform
from pathlib import Path

import torch

from .timer import Row, process_peak_mib


def table(rows: list[Row]) -> str:
    """Return the rows as aligned text, a block a case."""
    lines, case = [], None
    for row in rows:
        if row.case != case:
            case = row.case
            lines += ["", case]
            lines += [
                f"  {'':22}{'median ms':>11}{'min..max ms':>20}{'speedup':>9}{'TFLOP/s':>9}"
                f"{'peak MiB':>10}"
            ]
        spread = f"{row.low_s * 1e3:.2f}..{row.high_s * 1e3:.2f}"
        lines += [
            f"  {row.name:22}{row.median_s * 1e3:11.2f}{spread:>20}{row.speedup:9.2f}"
            f"{row.tflops:9.3f}{row.peak_mib:10.1f}"
        ]
        others = [f"{ratio:.3f} over {name}" for name, ratio in row.over.items()]
        if len(others) > 1:
            lines += [f"  {'':22}paired: {', '.join(others)}"]
    return "\n".join(lines)


def save(name: str, rows: list[Row], formula: str, settings: dict, output: Path) -> list[Path]:
    """Write `name`.json and `name`.png under `output`; return both paths."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    output.mkdir(parents=True, exist_ok=True)
    document = {
        "benchmark": name,
        "flop_formula": formula,
        "settings": settings,
        "torch": torch.__version__,
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "process_peak_mib": process_peak_mib(),
        "rows": [row.as_dict() for row in rows],
    }
    json_path, png_path = output / f"{name}.json", output / f"{name}.png"
    json_path.write_text(json.dumps(document, indent=1) + "\n")
    cases = list(dict.fromkeys(row.case for row in rows))
    names = list(dict.fromkeys(row.name for row in rows))
    figure, axes = plt.subplots(figsize=(9, 1 + 0.7 * len(cases)))
    height = 0.8 / len(names)
    for index, candidate in enumerate(names):
        chosen = [row for row in rows if row.name == candidate]
        at = [cases.index(row.case) + index * height for row in chosen]
        bars = axes.barh(at, [row.speedup for row in chosen], height * 0.95, label=candidate)
        axes.bar_label(bars, fmt="%.2f", padding=2, fontsize=8)
    axes.set_yticks([i + 0.4 - height / 2 for i in range(len(cases))], cases, fontsize=8)
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel(f"speedup over {names[0]} (median of paired runs)")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(png_path, dpi=120)
    plt.close(figure)
    return [json_path, png_path]
