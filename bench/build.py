"""``python -m bench build``: what it takes to build and to import the package, mode by mode.

Each mode is built by ``pip wheel .`` with pip's isolation, in a copy of the sources without objects
of earlier builds: seconds, memory of all its processes together, bytes of the wheel; seconds of the
same build once more, and the objects that one changed kernel compiles again. Then what `import
fuseformer` adds to `import torch`, medians of five. ``--output`` keeps the numbers as JSON.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.progress import Progress

ROOT = Path(__file__).parents[1]
COPIED = ("build_tools", "csrc", "kernels", "python", "setup.py", "pyproject.toml", "MANIFEST.in")
COPIED += ("README.md", "LICENSE")
NEEDS = {
    "none": "nothing but Python",
    "cpu": "a C++ compiler, torch's headers",
    "cuda": "besides, CUDA 12.4 or newer, of the system or the package index",
}
#: Of the rules for each mode: seconds, bytes of memory.
GOALS = {"none": (10, 3e9), "cpu": (60, 3e9), "cuda": (180, 3e9)}
WHEEL_GOAL, REBUILD_GOAL, IMPORT_SECONDS, IMPORT_BYTES = 20e6, 10, 0.3, 30e6


@dataclass(frozen=True)
class Build:
    """What a build of a mode took."""

    mode: str
    seconds: float
    memory: int
    wheel: int
    again: float
    changed_objects: int
    objects: int


def _session_memory(session: int) -> int:
    """Return the bytes of memory that the processes of a session have together."""
    pages = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The name, in parentheses, may have blanks in it.
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has ended
        if int(fields[3]) == session:
            pages += int(fields[21])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _timed(sources: Path, out: Path, mode: str) -> tuple[float, int]:
    """Build a wheel; return seconds and the most memory. Raises `RuntimeError` with the output."""
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", out, sources]
    environment = os.environ | {"FUSEFORMER_BUILD": mode, "SOURCE_DATE_EPOCH": "1700000000"}
    begin, most, ended = time.perf_counter(), [0], threading.Event()
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            [*map(str, command)],
            stdout=said,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=out,
            start_new_session=True,
        )

        def watch() -> None:
            while not ended.wait(0.2):
                most[0] = max(most[0], _session_memory(process.pid))

        watcher = threading.Thread(target=watch)
        watcher.start()
        failed = process.wait()
        ended.set()
        watcher.join()
        if failed:
            said.seek(0)
            raise RuntimeError(f"building in mode {mode!r} failed:\n{said.read()[-4000:]}")
    return time.perf_counter() - begin, most[0]


def measure(mode: str) -> Build:
    """Build in a copy without objects, once more, and after a change of one kernel."""
    with tempfile.TemporaryDirectory() as folder:
        sources, out = Path(folder) / "sources", Path(folder) / "out"
        sources.mkdir()
        out.mkdir()
        ignored = shutil.ignore_patterns("*.so", "__pycache__", "_build.json", "*.egg-info")
        for name in COPIED:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            options = {"ignore": ignored} if copy is shutil.copytree else {}
            copy(ROOT / name, sources / name, **options)
        seconds, memory = _timed(sources, out, mode)
        (wheel,) = out.glob("*.whl")
        size = wheel.stat().st_size
        objects = set(sources.glob("build/extension/*.o"))
        again, _ = _timed(sources, out, mode)
        changed = 0
        if mode == "cuda":
            kernel = sources / "csrc/attention/decode_bf16.cu"
            kernel.write_text(kernel.read_text() + "// changed\n")
            _timed(sources, out, mode)
            changed = len(set(sources.glob("build/extension/*.o")) - objects)
        return Build(mode, seconds, memory, size, again, changed, len(objects))


def import_cost() -> tuple[float, int]:
    """Return the seconds and bytes that importing adds to importing torch, medians of five."""
    code = (
        "import json, time\n"
        "def resident(): return int(open('/proc/self/statm').read().split()[1]) * 4096\n"
        "import torch\n"
        "before, begin = resident(), time.perf_counter()\n"
        "import fuseformer\n"
        "print(json.dumps([time.perf_counter() - begin, resident() - before]))\n"
    )
    found = [
        json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True).stdout)
        for _ in range(6)
    ][1:]  # the first compiles what is not yet
    return statistics.median(f[0] for f in found), int(statistics.median(f[1] for f in found))


def faults(builds: list[Build], seconds: float, memory: int) -> list[str]:
    """Return which goals are missed."""
    found = []
    for b in builds:
        most_seconds, most_memory = GOALS[b.mode]
        for what, got, goal in (
            ("seconds", b.seconds, most_seconds),
            ("bytes of memory", b.memory, most_memory),
            ("bytes of the wheel", b.wheel, WHEEL_GOAL),
            ("seconds for an unchanged build", b.again, REBUILD_GOAL),
            ("objects for one changed kernel", b.changed_objects, 1),
        ):
            if got > goal:
                found.append(f"{b.mode}: {what} {got:,.1f}, asked {goal:,.0f}")
    if seconds > IMPORT_SECONDS:
        found.append(f"importing adds {seconds:.2f} s, asked {IMPORT_SECONDS}")
    if memory > IMPORT_BYTES:
        found.append(f"importing adds {memory / 1e6:.0f} MB, asked {IMPORT_BYTES / 1e6:.0f}")
    return found


def main(arguments: list[str]) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m bench build",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--mode", nargs="+", choices=tuple(NEEDS), default=list(NEEDS))
    parser.add_argument("--output", type=Path, help="JSON")
    asked = parser.parse_args(arguments)
    builds = []
    with Progress() as progress:
        task = progress.add_task("building", total=len(asked.mode))
        for mode in asked.mode:
            builds.append(measure(mode))
            progress.update(task, advance=1)
    print("| mode | seconds | memory | wheel | again, unchanged | what it needs |")
    print("|---|---|---|---|---|---|")
    for b in builds:
        print(
            f"| `{b.mode}` | {b.seconds:.0f} | {b.memory / 1e9:.2f} GB | {b.wheel / 1e6:.1f} MB | "
            f"{b.again:.0f} s | {NEEDS[b.mode]} |"
        )
        if b.mode == "cuda":
            print(f"one changed kernel compiles {b.changed_objects} of {b.objects} objects")
    seconds, memory = import_cost()
    print(f"`import fuseformer` adds {seconds:.2f} s and {memory / 1e6:.0f} MB to `import torch`")
    if asked.output:
        kept = {"builds": [asdict(b) for b in builds], "import": [seconds, memory]}
        asked.output.write_text(json.dumps(kept, indent=1) + "\n")
        print(f"wrote {asked.output}")
    found = faults(builds, seconds, memory)
    for fault in found:
        print(f"FAULT {fault}", file=sys.stderr)
    return 1 if found else 0
