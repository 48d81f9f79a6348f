"""What the compiler made of a launch: registers, spills, shared memory, and a score of its loops.

The score of a loop is the cycles that a warp spends issuing and stalling in one iteration, as the
compiler's own schedule has them (`bench.loops`), over the cycles that the tensor cores need for its
products. It compares binaries for one architecture and is not a time: waits for memory are not in
it. 1 is a warp that keeps its tensor core busy alone; asynchronous products may go below.

All of it is read from the binary that Triton would send to the GPU, with the tools that Triton
brings along.
"""

import hashlib
import json
import os
import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import triton
from fuseformer.kernels.common import KernelSpec
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas

from .launches import GFX942, SHARED_LIMIT, half_precision
from .loops import product_loops

TENSOR_MEMORY_COLUMNS = 512
#: Dense 16-bit multiply-adds per cycle and warp scheduler, where encodings can be read.
MACS_PER_CYCLE = {80: 256, 86: 128, 89: 128, 90: 512}
TENSOR_CORE = re.compile(r"\bmma\.sync|wgmma\.mma_async|tcgen05\.mma|\bv_mfma")
CACHE = Path(__file__).parent.parent / "build" / "scores"

_LINE = re.compile(r"^\t\.(loc|file)\b.*", re.M)


# ------------------------------------------------------------------------------------------------
# Tools
# ------------------------------------------------------------------------------------------------


def _read(tool: str, *options: str, binary: bytes) -> str:
    """Return what one of Triton's tools prints about a binary."""
    path = getattr(knobs.nvidia, tool).path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [path, *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def disassemble(binary: bytes) -> str:
    """Return the disassembly of a binary with encodings."""
    return _read("nvdisasm", "-c", "-hex", binary=binary)


def resources(binary: bytes) -> tuple[int, int]:
    """Return the registers of a kernel, and its local memory per thread: where spills go."""
    usage = _read("cuobjdump", "-res-usage", binary=binary)
    found = {k: int(v) for k, v in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    assert len(found) == 3, f"cuobjdump says something new: {usage}"
    return found["REG"], found["STACK"] + found["LOCAL"]


def _serialized(ptx: str, capability: int) -> bool:
    """Return whether the assembler waits for each wgmma by itself: it says so in a warning."""
    if "wgmma.mma_async" not in ptx:
        return False
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [get_ptxas(capability).path, "-v", "-arch=sm_90a", source, "-o", "/dev/null"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return "C7515" in done.stderr


@cache
def versions() -> dict[str, str]:
    """Return the versions that numbers depend on: Triton's, and its assemblers'."""
    assemblers = {f"ptxas for sm_{c}": get_ptxas(c).version for c in (80, 90, 100)}
    return {"triton": triton.__version__, **assemblers}


def without_line_numbers(ptx: str) -> str:
    """Return PTX that stays the same where the lines of its source move."""
    return _LINE.sub(r"\t.\1", ptx).split("\t.section\t.debug_")[0]


# ------------------------------------------------------------------------------------------------
# Binaries
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Binary:
    """A compiled launch."""

    registers: int
    spilled: int  # bytes per thread
    shared: int  # bytes per program
    tensor_memory: int  # columns
    tensor_instructions: int  # as written in the PTX
    products: bool  # whether the kernel asks for any
    serialized: bool = False
    scores: tuple[float, ...] = ()  # of the loops with products, best first; none if not scored

    @property
    def score(self) -> float | None:
        """Return the score of the full loop, the one without masks: the best one."""
        return self.scores[0] if self.scores else None

    @property
    def edge_score(self) -> float | None:
        """Return the score of the loop at the edge of the mask: the worst other one."""
        return self.scores[-1] if len(self.scores) > 1 else None


def build(spec: KernelSpec, capability: int, *, scored: bool = False, **options: int) -> Binary:
    """Compile a launch for an architecture that need not be there.

    With `scored` its loops get scores, where control bits can be decoded. What came of the PTX is
    kept under `CACHE`. `options` take the place of the compiler's in `spec`.
    """
    if capability == GFX942:
        return _build_gfx942(spec, options)
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(spec.source(), target=target, options=spec.options | options)
    ptx = compiled.asm["ptx"]
    scored = scored and capability in MACS_PER_CYCLE and bool(TENSOR_CORE.search(ptx))
    readers = [Path(__file__).with_name(f"{name}.py").read_text() for name in ("binaries", "loops")]
    inputs = (without_line_numbers(ptx), scored, versions(), readers)
    kept = CACHE / f"{hashlib.sha256(repr(inputs).encode()).hexdigest()}.json"
    if kept.exists():
        stored = json.loads(kept.read_text())
        return Binary(**stored | {"scores": tuple(stored["scores"])})
    registers, spilled = resources(compiled.asm["cubin"])
    loops = product_loops(disassemble(compiled.asm["cubin"])) if scored else []
    rate = MACS_PER_CYCLE.get(capability, 0)
    binary = Binary(
        registers=registers,
        spilled=spilled,
        shared=compiled.metadata.shared,
        tensor_memory=getattr(compiled.metadata, "tmem_size", None) or 0,
        tensor_instructions=len(TENSOR_CORE.findall(ptx)),
        products="tt.dot" in compiled.asm["ttir"],
        serialized=scored and _serialized(ptx, capability),
        scores=tuple(sorted(round(loop.cycles * rate / loop.macs, 3) for loop in loops)),
    )
    CACHE.mkdir(parents=True, exist_ok=True)
    part = kept.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(asdict(binary)))
    part.replace(kept)
    return binary


def _build_gfx942(spec: KernelSpec, options: dict[str, int]) -> Binary:
    """Compile a launch for AMD's gfx942, whose assembly says what it takes; without a score."""
    target = GPUTarget("hip", "gfx942", 64)
    compiled = triton.compile(spec.source(), target=target, options=spec.options | options)
    text = compiled.asm["amdgcn"]
    said = {k: int(v) for k, v in re.findall(r"^\s+\.(\w+):\s+(\d+)$", text, re.M)}
    return Binary(
        registers=said["vgpr_count"],
        spilled=said["private_segment_fixed_size"],
        shared=compiled.metadata.shared,
        tensor_memory=0,
        tensor_instructions=len(TENSOR_CORE.findall(text)),
        products="tt.dot" in compiled.asm["ttir"],
    )


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
