"""``python -m bench scores``: every launch compiled for every architecture, and what came of it.

Prints a table of registers, spilled bytes, shared memory, tensor-core instructions and scores
(`bench.binaries` says what a score is), then the project's goals against what was got. ``--output``
keeps the numbers as JSON, ``--check`` holds them against such a file: a score more than 3 % worse,
a spill or any other fault, and a launch that one side lacks end with status 1.
"""

import argparse
import json
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from . import binaries, goals
from .known_spills import known_spill, new_faults
from .launches import SHARED_LIMIT, Launch, architecture, capability_of, launches

STORED = Path(__file__).parent / "results" / "compile_matrix.json"
TOLERANCE = 0.03

Row = dict[str, Any]
#: What is compiled, by name and architecture.
Work = dict[tuple[str, int], Launch]
Rows = dict[tuple[str, int], Row]

_work: Work = {}  # forked workers find it here: launches cannot be sent to them


def work(capabilities: list[int], match: list[str]) -> Work:
    """Return the launches for these architectures whose names hold each text of `match`."""
    return {
        (name, capability): launch
        for capability in capabilities
        for name, launch in launches(capability).items()
        if all(text in name for text in match)
    }


def measure(launch: Launch, capability: int) -> Row:
    """Compile one launch; what goes wrong becomes the row's error."""
    row: Row = {"config": launch.config}
    try:
        binary = binaries.build(launch.spec, capability, scored=True)
    except Exception as error:  # whatever the compiler raises belongs into the table
        said = str(error).strip().splitlines() or [""]
        return row | {"error": f"{type(error).__name__}: {said[0]}"[:200]}
    row |= {
        "registers": binary.registers,
        "spilled": binary.spilled,
        "shared": binary.shared,
        "tensor_instructions": binary.tensor_instructions,
    }
    if binary.score is not None:
        row["score"] = binary.score
    if binary.edge_score is not None:
        row["edge_score"] = binary.edge_score
    if found := binaries.faults(binary, launch.spec, capability):
        row["faults"] = found
    return row


def _measure(key: tuple[str, int]) -> Row:
    return measure(_work[key], key[1])


def measure_all(items: Work, workers: int) -> Rows:
    """Measure in parallel; a compiler that takes its process with it costs one row."""
    _work.clear()
    _work.update(items)
    rows: Rows = {}
    columns = ("[progress.description]{task.description}", BarColumn(), MofNCompleteColumn())
    # No refreshing thread: workers are forked.
    with Progress(*columns, TimeRemainingColumn(), auto_refresh=False) as progress:
        task = progress.add_task("compiling", total=len(items))
        for key, row in _pooled(list(items), workers):
            rows[key] = row
            progress.update(task, advance=1, refresh=True)
        # Whoever was at work when a process died is tried again alone.
        for key in [key for key in items if key not in rows]:
            alone = dict(_pooled([key], 1))
            rows[key] = alone.get(key) or {
                "config": items[key].config,
                "error": "the compiler ended its process",
            }
            progress.update(task, advance=1, refresh=True)
    return {key: rows[key] for key in items}


def _pooled(keys: list[tuple[str, int]], workers: int) -> Iterator[tuple[tuple[str, int], Row]]:
    """Yield rows as they come, none for those that a dead process left unmeasured."""
    with ProcessPoolExecutor(workers, mp_context=get_context("fork")) as pool:
        futures: dict[Future[Row], tuple[str, int]] = {pool.submit(_measure, k): k for k in keys}
        for future in as_completed(futures):
            try:
                yield futures[future], future.result()
            except BrokenProcessPool:
                continue


# ------------------------------------------------------------------------------------------------
# What is kept
# ------------------------------------------------------------------------------------------------


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def document(rows: Rows, before: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return what to keep of rows, on top of what was kept before."""
    kept: dict[str, dict[str, Row]] = {}
    if before is not None:
        kept = before["launches"]
    for (name, capability), row in rows.items():
        kept.setdefault(name, {})[architecture(capability)] = row
    return {"compilers": binaries.versions(), "launches": kept}


def save(kept: dict[str, Any], path: Path) -> None:
    """Write a document, one line a row: a changed row is a changed line."""
    launched = []
    for name, by_architecture in sorted(kept["launches"].items()):
        rows = [
            f"   {json.dumps(there)}: {json.dumps(by_architecture[there])}"
            for there in sorted(by_architecture, key=capability_of)
        ]
        launched.append(f"  {json.dumps(name)}: {{\n" + ",\n".join(rows) + "\n  }")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f'{{\n "compilers": {json.dumps(kept["compilers"], sort_keys=True)},\n'
        ' "launches": {\n' + ",\n".join(launched) + "\n }\n}\n"
    )


def problems(rows: Rows, kept: dict[str, Any] | None, match: list[str] | None = None) -> list[str]:
    """Return what is wrong with rows, and where they are worse than those of `kept`.

    With `match`, rows are all launches whose names hold its texts: others are missing.
    """
    found = []
    for (name, capability), row in rows.items():
        where = f"{name} on {architecture(capability)}"
        known, spilled = known_spill(name, capability), row.get("spilled", 0)
        found += [f"{where}: {fault}" for fault in new_faults(row, known)]
        if known and not spilled and "error" not in row:
            found.append(f"{where}: spills nothing, but is listed in bench/known_spills.py")
        if "error" in row:
            found.append(f"{where}: {row['error']}")
        if kept is None:
            continue
        before = kept["launches"].get(name, {}).get(architecture(capability))
        if before is None:
            found.append(f"{where}: not in the stored matrix")
            continue
        for score in ("score", "edge_score"):
            was, now = before.get(score), row.get(score)
            if was is not None and "error" not in row and (now is None or _worse(now, was)):
                found.append(f"{where}: {score} {now}, was {was}")
    if kept is None or match is None:
        return found
    measured = {capability for _, capability in rows} or set(SHARED_LIMIT)
    for name, by_architecture in kept["launches"].items():
        for there in by_architecture:
            capability = capability_of(there)
            asked = capability in measured and all(text in name for text in match)
            if asked and (name, capability) not in rows:
                found.append(f"{name} on {there}: stored, but no longer launched")
    return found


def _worse(now: float, was: float) -> bool:
    # Stored scores are rounded to three digits.
    return now > was * (1 + TOLERANCE) + 5e-4


# ------------------------------------------------------------------------------------------------
# What is printed
# ------------------------------------------------------------------------------------------------


def table(rows: Rows) -> str:
    """Return the rows as aligned text, a block a launch."""
    head = (
        f"{'':8}{'regs':>5}{'spilled':>8}{'shared':>8}{'mma':>5}{'full':>7}{'edge':>7}{'ratio':>7}"
    )
    lines: list[str] = []
    by_name: dict[str, dict[int, Row]] = {}
    for (name, capability), row in rows.items():
        by_name.setdefault(name, {})[capability] = row
    for name, by_capability in by_name.items():
        lines += ["", name, head]
        for capability, row in sorted(by_capability.items()):
            config = " ".join(f"{k}={v}" for k, v in row["config"].items())
            if "error" in row:
                lines.append(f"  {architecture(capability):<7}{row['error']}  {config}")
                continue
            score, edge = row.get("score"), row.get("edge_score")
            figures = [score, edge, edge / score if edge and score else None]
            shown = "".join(f"{'' if f is None else f'{f:.3f}':>7}" for f in figures)
            new = new_faults(row, known_spill(name, capability))
            faults = "".join(
                f"  {'FAULT' if fault in new else 'KNOWN'}: {fault}"
                for fault in row.get("faults", [])
            )
            lines.append(
                f"  {architecture(capability):<7}{row['registers']:4}{row['spilled']:8}"
                f"{row['shared']:8}{row['tensor_instructions']:5}{shown}  {config}{faults}"
            )
    return "\n".join(lines[1:])


def main(arguments: list[str]) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m bench scores",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [architecture(capability) for capability in SHARED_LIMIT]
    parser.add_argument("--family", nargs="+", choices=names, default=names, metavar="sm_80")
    parser.add_argument("--match", nargs="+", default=[], help="texts that a launch's name holds")
    parser.add_argument("--goals", action="store_true", help="only what the goals are about")
    parser.add_argument("--workers", type=int, default=1, help="compilers at once (default 1)")
    parser.add_argument("--output", type=Path, help="JSON; a part of a run replaces its rows")
    parser.add_argument("--check", type=Path, metavar="JSON", help=f"such as {STORED.name}")
    asked = parser.parse_args(arguments)
    # Triton 3.9 says with every compilation that a default will change.
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION is unset")
    kept = load(asked.check) if asked.check else None
    if kept and kept["compilers"] != binaries.versions():
        there, here = kept["compilers"], binaries.versions()
        parser.error(f"--check {asked.check} is of other compilers: {there}, here {here}")
    whole = not asked.match and not asked.goals and set(asked.family) == set(names)
    before = None
    if asked.output and asked.output.exists() and not whole:
        before = load(asked.output)
        if before["compilers"] != binaries.versions():
            parser.error(f"--output {asked.output} is of other compilers: replace it as a whole")
    capabilities = [capability_of(name) for name in asked.family]
    items = work(capabilities, asked.match)
    if asked.goals:
        items = {key: launch for key, launch in items.items() if goals.needed(launch, key[1])}
    rows = measure_all(items, asked.workers)
    print(table(rows))
    print(goals.summary(items, rows))
    if asked.output:
        save(document(rows, before), asked.output)
        print(f"wrote {asked.output}")
    found = problems(rows, kept, None if asked.goals else asked.match)
    for problem in found:
        print(f"FAULT {problem}", file=sys.stderr)
    print(f"{len(rows)} launches compiled, {len(found)} faults")
    return 1 if found else 0
