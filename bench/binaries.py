"""What the compiler made of a launch: registers, spills, shared memory, and a score of its loops.

The score of a loop is the cycles that a warp spends issuing and stalling in one iteration, as the
compiler's own schedule has them (`bench.loops`), over the cycles that the tensor cores need for its
products. It compares binaries for one architecture and is not a time: waits for memory are not in
it. 1 is a warp that keeps its tensor core busy alone; asynchronous products may go below.

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

import triton
from fuseformer.kernels.common import KernelSpec
from triton.backends.compiler import GPUTarget

from .launches import SHARED_LIMIT, half_precision
from .loops import product_loops

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


def tool(name: str) -> Path:
    """Return an executable that a package of the extra "scores" brought."""
    site = Path(sysconfig.get_path("purelib"))
    folder = Path(sys.prefix) / "bin" if name == "cuxray" else site / "nvidia/cu13/bin"
    path = folder / name
    if not path.exists():
        raise FileNotFoundError(f"{path}: install the extra, pip install 'fuseformer[scores]'")
    return path


def run(*command: str | Path) -> str:
    """Return what a command printed, to both outputs; a failure raises with its message."""
    environment = os.environ | {"CUXRAY_NO_FETCH": "1"}
    environment["PATH"] = os.pathsep.join([str(tool("nvdisasm").parent), environment["PATH"]])
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


def disassemble(ptx: str) -> tuple[str, str]:
    """Assemble PTX; return the disassembly with encodings, and what the assembler said."""
    with tempfile.TemporaryDirectory() as name:
        source, cubin = Path(name) / "kernel.ptx", Path(name) / "kernel.cubin"
        source.write_text(ptx)
        target = re.search(r"^\.target (sm_\w+)", ptx, re.M)
        assert target
        said = run(tool("ptxas"), f"-arch={target[1]}", source, "-o", cubin)
        return run(tool("nvdisasm"), "-c", "-hex", cubin), said


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

    With `scored` its loops get scores, where control bits can be decoded. What came of the PTX is
    kept under `CACHE`. `options` take the place of the compiler's in `spec`.
    """
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
    registers, spilled = _resources(compiled.asm["cubin"])
    disassembly, said = disassemble(ptx) if scored else ("", "")
    loops = product_loops(disassembly)
    rate = MACS_PER_CYCLE.get(capability, 0)
    binary = Binary(
        registers=registers,
        spilled=spilled,
        shared=compiled.metadata.shared,
        tensor_memory=getattr(compiled.metadata, "tmem_size", None) or 0,
        tensor_instructions=len(TENSOR_CORE.findall(ptx)),
        products="tt.dot" in compiled.asm["ttir"],
        serialized="C7515" in said,
        scores=tuple(sorted(round(loop.cycles * rate / loop.macs, 3) for loop in loops)),
    )
    CACHE.mkdir(parents=True, exist_ok=True)
    part = kept.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(asdict(binary)))
    part.replace(kept)
    return binary


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
