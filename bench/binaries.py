"""What the compiler made of a launch: registers, spills, shared memory, and a score of its loops.

The score of a loop is the cycles that a warp spends issuing and stalling in one iteration, as the
compiler's own schedule has them (`cuxray sched`), over the cycles that the tensor cores need for
its products. It compares binaries for one architecture and is not a time: waits for memory are not
in it. 1 is a warp that keeps its tensor core busy alone; asynchronous products may go below.

Registers, spills and shared memory are those of the binary that Triton ships to the GPU. The score
is read from the same PTX assembled by the CUDA 13 assembler of the extra "scores", because its
disassembler refuses what older ones wrote.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import triton
from fuseformer.kernels.common import KernelSpec
from triton.backends.compiler import GPUTarget

from .launches import SHARED_LIMIT, half_precision
from .loops import Loop, loop_bodies

TENSOR_MEMORY_COLUMNS = 512
#: Dense 16-bit multiply-adds per cycle and warp scheduler; also the architectures `sched` decodes.
MACS_PER_CYCLE = {80: 256, 86: 128, 89: 128, 90: 512}
TENSOR_CORE = re.compile(r"\bmma\.sync|wgmma\.mma_async|tcgen05\.mma")
CACHE = Path(__file__).parent.parent / "build" / "scores"
PACKAGES = ("cuxray", "nvidia-cuda-nvcc", "nvidia-cuda-nvdisasm")

_BUNDLED_CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
_LINE = re.compile(r"^\t\.(loc|file)\b.*", re.M)


# ------------------------------------------------------------------------------------------------
# Tools
# ------------------------------------------------------------------------------------------------


def _tool(name: str) -> Path:
    """Return an executable that a package of the extra "scores" brought."""
    site = Path(sysconfig.get_path("purelib"))
    folder = Path(sys.prefix) / "bin" if name == "cuxray" else site / "nvidia/cu13/bin"
    path = folder / name
    if not path.exists():
        raise FileNotFoundError(f"{path}: install the extra, pip install 'fuseformer[scores]'")
    return path


def _run(*command: str | Path) -> str:
    """Return what a command printed, to both outputs; a failure raises with its message."""
    environment = os.environ | {"CUXRAY_NO_FETCH": "1"}
    environment["PATH"] = os.pathsep.join([str(_tool("nvdisasm").parent), environment["PATH"]])
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        raise RuntimeError(f"{Path(command[0]).name}: {' '.join(said)}")
    return done.stdout + done.stderr


@cache
def versions() -> dict[str, str | None]:
    """Return the versions that numbers depend on; None for what is not installed."""

    def found(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    return {package: found(package) for package in ("triton", *PACKAGES)}


def without_line_numbers(ptx: str) -> str:
    """Return PTX that stays the same where the lines of its source move."""
    return _LINE.sub(r"\t.\1", ptx).split("\t.section\t.debug_")[0]


def _loops(ptx: str, capability: int) -> tuple[list[Loop], bool]:
    """Assemble PTX and score its loops; also whether the assembler had to serialise wgmma."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source, cubin, schedule = (folder / f"kernel.{s}" for s in ("ptx", "cubin", "json"))
        source.write_text(ptx)
        target = re.search(r"^\.target (sm_\w+)", ptx, re.M)
        assert target
        said = _run(_tool("ptxas"), f"-arch={target[1]}", source, "-o", cubin)
        bodies = loop_bodies(_run(_tool("nvdisasm"), "-c", cubin))
        _run(_tool("cuxray"), "sched", cubin, "--json", "-o", schedule)
        scheduled = json.loads(schedule.read_text())["results"]
    rate, loops = MACS_PER_CYCLE[capability], []
    for row in (row for result in scheduled for row in result["loops"]):
        if body := bodies.get(row["header"]):
            cycles = row["est_issue_stall_cycles_per_iter"]
            score = round(cycles * rate / body["macs"], 3)
            loops.append(Loop(row["header"], cycles, body["instructions"], body["macs"], score))
    return sorted(loops, key=lambda loop: loop.score), "C7515" in said


# ------------------------------------------------------------------------------------------------
# Binaries
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loop:
    """An innermost loop with products: what one iteration of one warp takes and does."""

    header: str
    cycles: int
    instructions: int
    macs: int
    score: float


@dataclass(frozen=True)
class Binary:
    """A compiled launch; `loops` are best first, None where they were not or cannot be scored."""

    registers: int
    spilled: int  # bytes per thread
    shared: int  # bytes per program
    tensor_memory: int  # columns
    tensor_instructions: int  # as written in the PTX
    products: bool  # whether the kernel asks for any
    serialized: bool = False
    loops: tuple[Loop, ...] | None = None

    @property
    def score(self) -> float | None:
        """Return the score of the full loop, the one without masks: the best one."""
        return self.loops[0].score if self.loops else None

    @property
    def edge_score(self) -> float | None:
        """Return the score of the loop at the edge of the mask: the worst other one."""
        return self.loops[-1].score if self.loops and len(self.loops) > 1 else None


def _resources(cubin: bytes) -> tuple[int, int]:
    """Return the registers of a kernel, and its local memory per thread: where spills go."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_BUNDLED_CUOBJDUMP, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {k: int(v) for k, v in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    assert len(found) == 3, f"cuobjdump says something new: {usage}"
    return found["REG"], found["STACK"] + found["LOCAL"]


def build(spec: KernelSpec, capability: int, *, scored: bool = False, **options: int) -> Binary:
    """Compile a launch for an architecture that need not be there.

    With `scored` its loops are too, where they can be; results are kept under `CACHE`. `options`
    take the place of the compiler's in `spec`.
    """
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(spec.source(), target=target, options=spec.options | options)
    ptx = compiled.asm["ptx"]
    scored = scored and capability in MACS_PER_CYCLE and bool(TENSOR_CORE.search(ptx))
    inputs = (
        without_line_numbers(ptx),
        scored,
        sorted(versions().items()),
        Path(__file__).read_text(),
    )
    kept = CACHE / f"{hashlib.sha256(repr(inputs).encode()).hexdigest()}.json"
    if kept.exists():
        return _binary(json.loads(kept.read_text()))
    registers, spilled = _resources(compiled.asm["cubin"])
    loops, serialized = _loops(ptx, capability) if scored else (None, False)
    binary = Binary(
        registers=registers,
        spilled=spilled,
        shared=compiled.metadata.shared,
        tensor_memory=getattr(compiled.metadata, "tmem_size", None) or 0,
        tensor_instructions=len(TENSOR_CORE.findall(ptx)),
        products="tt.dot" in compiled.asm["ttir"],
        serialized=serialized,
        loops=None if loops is None else tuple(loops),
    )
    CACHE.mkdir(parents=True, exist_ok=True)
    part = kept.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(asdict(binary)))
    part.replace(kept)
    return binary


def _binary(stored: dict[str, Any]) -> Binary:
    loops = stored.pop("loops")
    return Binary(**stored, loops=None if loops is None else tuple(Loop(**loop) for loop in loops))


def faults(binary: Binary, spec: KernelSpec, capability: int) -> list[str]:
    """Return what is wrong with a binary, as phrases."""
    found = []
    if binary.spilled:
        found.append(f"{binary.spilled} bytes of registers spilled per thread")
    if binary.shared > SHARED_LIMIT[capability] * 1024:
        found.append(f"{binary.shared} bytes of shared memory")
    if binary.tensor_memory > TENSOR_MEMORY_COLUMNS:
        found.append(f"{binary.tensor_memory} columns of tensor memory")
    if half_precision(spec) and binary.products and not binary.tensor_instructions:
        found.append("a product without tensor cores")
    if binary.serialized:
        found.append("wgmma serialised by the assembler (C7515)")
    return found
