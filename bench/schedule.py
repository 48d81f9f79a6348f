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
    asked = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    print(f"{'launch':60}{'':8}{'slots':>6}{'waves':>8}{'makespan':>10}{'busy':>7}{'asked':>7}")
    for launch, architecture in itertools.product(launches(tuple(asked.lengths)), asked.arch):
        done = run(launch, architecture)
        goal = LEAST_BUSY if done.waves >= WAVES else None
        missed = goal is not None and done.busy < goal
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
    if asked.output:
        asked.output.write_text(json.dumps(rows, indent=1) + "\n")
        print(f"wrote {asked.output}")
    return 1 if failures else 0
