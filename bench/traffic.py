"""``python -m bench bytes``: what each Triton kernel asks of global memory, and the least it could.

The kernels are executed on the CPU, where every element of every load and store that a mask lets
through is counted. The least is what the kernel must move with the tiles it has: inputs and outputs
once, and what each of its programs needs to itself once a program: `bench.traffic_least` has the
formulas. Caches serve part of both.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
from ttsem import memory, sanitize

from .traffic_cases import CASES
from .traffic_least import LEAST

#: Kernels that may ask for no more than this many times the least.
LIMITS = {"attention_forward": 1.1}


@dataclass
class Traffic:
    """One launch: the bytes it read and wrote, and the least it could have; None if unknown."""

    case: str
    kernel: str
    tiles: str
    read: int
    written: int
    least: int | None

    @property
    def ratio(self) -> float | None:
        return (self.read + self.written) / self.least if self.least else None

    @property
    def over(self) -> bool:
        """Whether this is more than the kernel may ask for."""
        limit = LIMITS.get(self.kernel)
        return limit is not None and (self.ratio is None or self.ratio > limit)


# ------------------------------------------------------------------------------------------------
# Counting
# ------------------------------------------------------------------------------------------------


@contextmanager
def counted() -> Iterator[list[Traffic]]:
    """Collect the traffic of the launches made inside, where kernels are executed on the CPU.

    Their `case` is left empty.
    """
    load, store, run = memory.Memory.load, memory.Memory.store, triton.JITFunction.run
    launched: list[Traffic] = []

    def live(addresses: Any, mask: Any) -> int:
        lanes = True if mask is None else mask
        return int(np.broadcast_to(lanes, np.shape(addresses)).sum())

    def counting_load(self: Any, addresses: Any, mask: Any, other: Any, dtype: Any) -> Any:
        launched[-1].read += live(addresses, mask) * dtype.itemsize
        return load(self, addresses, mask, other, dtype)

    def counting_store(self: Any, addresses: Any, values: Any, mask: Any) -> None:
        launched[-1].written += live(addresses, mask) * values.dtype.itemsize
        store(self, addresses, values, mask)

    def counting_run(self: Any, *args: Any, grid: Any, **options: Any) -> Any:
        name = self.__name__.removesuffix("_kernel")
        tiles = {k: v for k, v in options.items() if k.startswith(("BLOCK", "EDGE", "ROWS"))}
        least = LEAST[name](options, prod(grid)) if name in LEAST else None
        shown = " ".join(f"{k}={v}" for k, v in tiles.items())
        launched.append(Traffic("", name, shown, 0, 0, least))
        return run(self, *args, grid=grid, **options)

    memory.Memory.load, memory.Memory.store = counting_load, counting_store
    triton.JITFunction.run = counting_run
    try:
        yield launched
    finally:
        memory.Memory.load, memory.Memory.store = load, store
        triton.JITFunction.run = run


# ------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------


def measure(case: str) -> list[Traffic]:
    """Run a case where kernels are executed on the CPU, and return its launches."""
    torch.manual_seed(0)
    with counted() as launched:
        CASES[case]()
    for row in launched:
        row.case = case
    return launched


def table(rows: list[Traffic]) -> str:
    """Return the rows as aligned text, a block a case."""
    lines, case = [], None
    for row in rows:
        if row.case != case:
            case = row.case
            lines += ["", case, f"  {'':32}{'read':>12}{'written':>12}{'least':>12}{'ratio':>7}"]
        ratio = "" if row.ratio is None else f"{row.ratio:.3f}"
        lines.append(
            f"  {row.kernel:32}{row.read:12}{row.written:12}{row.least or '-':>12}{ratio:>7}"
            f"  {row.tiles}{'  over its limit' * row.over}"
        )
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m bench bytes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--match", nargs="+", default=[], help="texts that a case's name holds")
    parser.add_argument("--output", type=Path, help="JSON")
    asked = parser.parse_args(arguments)
    rows = []
    with sanitize.session(80, "<bench>", cuda_is_cpu=False, races="off"):
        for case in CASES:
            if all(text in case for text in asked.match):
                rows += measure(case)
    print(table(rows))
    if asked.output:
        asked.output.parent.mkdir(parents=True, exist_ok=True)
        kept = [asdict(row) | {"ratio": row.ratio} for row in rows]
        asked.output.write_text(json.dumps(kept, indent=1) + "\n")
        print(f"wrote {asked.output}")
    over = [row for row in rows if row.over]
    for row in over:
        print(f"FAULT {row.case}: {row.kernel} asks for {row.ratio} x the least", file=sys.stderr)
    return 1 if over else 0
