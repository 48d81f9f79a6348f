"""``python -m bench schedule``: whole launches of the CUDA C++ forward kernels, without a GPU.

Blocks in grid order on the slots that registers and shared memory leave, waves and tails included
(`bench.simulator`); the unit is a step without a mask, a masked one costs what the binary says
(`bench.grids`). ``busy`` is the work over the slots times the makespan; with four waves of blocks
or more, at least 85 % is asked. A launch that has less ends with status 1.

The model leaves out what a block does before and after its steps, that blocks of one multiprocessor
share it, and memory. Backward launches, whose blocks take turns, and Triton's are not in it yet.
"""

import argparse
import itertools
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .grids import MULTIPROCESSORS, Launch
from .simulator import Schedule, simulate

LEAST_BUSY, WAVES = 0.85, 4.0
HEAD_DIMS = (32, 64, 96, 128, 256)
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)


def launches(lengths: tuple[int, ...] = LENGTHS) -> list[Launch]:
    """Return the launches that are looked at: attention of 16 heads, and feed-forward blocks."""
    found = []
    for dim, length in itertools.product(HEAD_DIMS, lengths):
        found.append(Launch("forward", dim, length, length, 16))
        found.append(Launch("forward", dim, length, length, 16, causal=True))
        found.append(Launch("forward", dim, length // 2, length, 16, True, True))
        found.append(Launch("forward", dim, length, length, 16, True, window=512))
    for tokens in (*lengths, 65536):
        found += [Launch("feed-forward", width, tokens, 4 * width) for width in (64, 128, 256)]
        found.append(Launch("linear", 1024, tokens, 4096))
    return found


def run(launch: Launch, architecture: int) -> Schedule:
    """Return the schedule of a launch."""
    return simulate(launch.blocks(architecture), launch.slots(architecture))


def plot(launch: Launch, architecture: int, path: Path) -> None:
    """Draw the blocks of a launch on their slots as a PNG, darker where they began later."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    done = run(launch, architecture)
    figure, axes = plt.subplots(figsize=(10, 6))
    shades = plt.get_cmap("viridis_r")
    axes.barh(
        [span.slot for span in done.spans],
        [span.end - span.begin for span in done.spans],
        left=[span.begin for span in done.spans],
        height=1.0,
        color=[shades(index / len(done.spans)) for index in range(len(done.spans))],
    )
    axes.set_xlim(0, done.makespan)
    axes.set_ylim(-0.5, done.slots - 0.5)
    axes.set_xlabel("time in steps without a mask; colours from the first block to the last")
    axes.set_ylabel("slot")
    axes.set_title(f"{launch} on sm_{architecture}: busy for {done.busy:.0%}")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: list[str]) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m bench schedule",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--arch", nargs="+", type=int, choices=MULTIPROCESSORS, default=[80])
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS, help="of sequences")
    parser.add_argument("--all", action="store_true", help="print launches that keep goals too")
    parser.add_argument("--output", type=Path, help="JSON")
    parser.add_argument("--plot", type=Path, help="PNG: the least busy launch")
    asked = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    lowest, least = (True, 2.0), (Launch("linear", 64, 0, 0), 80)
    print(f"{'launch':60}{'':8}{'slots':>6}{'waves':>8}{'makespan':>10}{'busy':>7}{'asked':>7}")
    for launch, architecture in itertools.product(launches(tuple(asked.lengths)), asked.arch):
        done = run(launch, architecture)
        goal = LEAST_BUSY if done.waves >= WAVES else None
        missed = goal is not None and done.busy < goal
        # Those that miss the goal come first.
        if (not missed, done.busy) < lowest:
            lowest, least = (not missed, done.busy), (launch, architecture)
        rows.append(
            asdict(launch)
            | {"sm": architecture, "slots": done.slots, "waves": done.waves}
            | {"makespan": done.makespan, "busy": done.busy, "asked": goal, "missed": missed}
        )
        if missed or asked.all:
            shown = "" if goal is None else f"{goal:.2f}"
            print(
                f"{launch!s:60}{f'sm_{architecture}':8}{done.slots:6}{done.waves:8.2f}"
                f"{done.makespan:10.1f}{done.busy:7.2f}{shown:>7}{'  missed' * missed}"
            )
    counted = sum(row["asked"] is not None for row in rows)
    failures = sum(row["missed"] for row in rows)
    print(f"{len(rows)} launches, {counted} of {WAVES:.0f} waves or more, {failures} below goal")
    if asked.plot:
        plot(*least, asked.plot)
        print(f"wrote {asked.plot}")
    if asked.output:
        asked.output.write_text(json.dumps(rows, indent=1) + "\n")
        print(f"wrote {asked.output}")
    return 1 if failures else 0
