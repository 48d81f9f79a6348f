"""``python -m bench cuda``: the CUDA C++ kernels compiled for GPUs that need not be there.

Prints registers, spilled bytes and, where control bits can be decoded, the scores of the full loop
and of the edge loop (`bench.binaries` says what a score is), beside the project's goals on sm_80
and the scores of flash-attention 2 there. ``--output`` keeps the numbers as JSON. A goal that is
missed, and a register that is spilled, end with status 1.
"""

import argparse
import itertools
import json
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.progress import Progress

from . import binaries
from .loops import product_loops

SOURCES = Path(__file__).parents[1] / "csrc"
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
#: Head dims of each pass, and of the backward with other tiles where there is less shared memory;
#: widths of the feed-forward block, both ways, rows of the tiles of products that end in the
#: activation, and first products of a block of few rows, 2 of a gated one.
PASSES = {
    ("forward", False): (32, 64, 96, 128, 256),
    ("backward", False): (32, 64, 96, 128, 256),
    ("backward", True): (96, 128, 256),
    ("feed-forward", False): (64, 128, 256),
    ("feed-forward backward", False): (64, 128, 256),
    ("feed-forward backward", True): (128, 256),
    ("linear", False): (128,),
    ("gated", False): (128,),
    ("gated gradient", False): (0,),
    ("few-rows", False): (1, 2),
    ("few-rows output", False): (1,),
    ("decode", False): (32, 64, 96, 128, 256),
}
#: Passes that are bound by memory: what a score says of the loop does not matter.
UNSCORED = ("gated gradient", "few-rows", "few-rows output", "decode")
#: Passes that have no dropout, or where it is no constant of the kernel.
WITHOUT_DROPOUT = ("few-rows", "few-rows output", "decode")
ELEMENTS = {"bf16": "Bfloat16", "fp16": "Half"}
#: Scores on sm_80 in bf16 without dropout: at most these. A backward pass has five products. The
#: feed-forward block has the activation relu: others are bound by their arithmetic.
GOALS = {
    ("forward", 32): 2.50,
    ("forward", 64): 1.50,
    ("forward", 96): 1.52,
    ("forward", 128): 1.42,
    ("forward", 256): 1.29,
    ("backward", 32): 2.20,
    ("backward", 64): 1.60,
    ("backward", 96): 1.57,
    ("backward", 128): 1.45,
    ("backward", 256): 1.55,
    # Only for GPUs whose tensor cores are half as fast, so that their limit is at 2.
    ("backward small", 256): 1.90,
    ("feed-forward", 128): 1.20,
    ("feed-forward", 256): 1.20,
    ("linear", 128): 1.15,
    ("gated", 128): 1.15,
}
#: The same of flash-attention 2, in the binary that torch 2.14.1 holds: measured once, not here.
FLASH_ATTENTION_2 = {
    ("forward", 32): 2.589,
    ("forward", 64): 1.667,
    ("forward", 96): 1.527,
    ("forward", 128): 1.446,
    ("forward", 256): 1.294,
    ("backward", 32): 2.249,
    ("backward", 64): 1.699,
    ("backward", 96): 1.577,
    ("backward", 128): 1.482,
    ("backward", 256): 1.552,
}


@dataclass(frozen=True)
class Kernel:
    """One instantiation."""

    which: str
    head_dim: int  # or what `PASSES` says
    dtype: str
    dropout: bool
    small: bool = False  # with the tiles for GPUs that have little shared memory

    @property
    def source(self) -> str:
        if self.which == "feed-forward":
            config = f"FeedForwardConfig<{ELEMENTS[self.dtype]}, {self.head_dim}>"
            return self._source(
                "feed_forward/forward_kernel.h",
                f"feed_forward_forward_kernel<{config}, Activation::kRelu, {self._flag}>",
                "FeedForwardParams",
            )
        if self.which == "feed-forward backward":
            name = f"{'Small' * self.small}FeedForwardBackwardConfig"
            config = f"{name}<{ELEMENTS[self.dtype]}, {self.head_dim}>"
            kind = "ActivationConstant<Activation::kRelu>"
            return self._source(
                "feed_forward/backward_kernel.h",
                f"feed_forward_backward_kernel<{config}, {kind}, {self._flag}>",
                "FeedForwardGradientParams",
            )
        if self.which in ("linear", "gated"):
            traits = f"LinearTraits<{ELEMENTS[self.dtype]}, {1 + (self.which == 'gated')}>"
            kernel = f"linear_kernel<{traits}, {self._flag}>"
            return self._source("feed_forward/linear_kernel.h", kernel, "LinearParams")
        if self.which == "gated gradient":
            kernel = f"gated_gradient_kernel<{ELEMENTS[self.dtype]}, {self._flag}>"
            return self._source(
                "feed_forward/gated_gradient_kernel.h", kernel, "GatedGradientParams"
            )
        if self.which == "decode":
            traits = f"DecodeTraits<{ELEMENTS[self.dtype]}, {self.head_dim}>"
            kernel = f"attention_decode_kernel<{traits}>"
            return self._source("attention/decode_kernel.h", kernel, "DecodeParams")
        if self.which.startswith("few-rows"):
            traits = f"FewRowsTraits<{ELEMENTS[self.dtype]}, {self.head_dim}>"
            part = "output" if "output" in self.which else "hidden"
            kernel = f"few_rows_{part}_kernel<{traits}>"
            return self._source("feed_forward/few_rows_kernel.h", kernel, "FewRowsParams")
        params = {"forward": "AttentionParams", "backward": "AttentionGradientParams"}[self.which]
        name = f"{'Small' * self.small}{self.which.title()}Config"
        config = f"{name}<{ELEMENTS[self.dtype]}, {self.head_dim}>"
        kernel = f"{self.which}{'_wide' * self.wide}_kernel"
        return self._source(
            f"attention/{kernel}.h", f"attention_{kernel}<{config}, {self._flag}>", params
        )

    @property
    def goal(self) -> float | None:
        """The score that is asked of it on sm_80, without dropout."""
        own = GOALS.get((f"{self.which}{' small' * self.small}", self.head_dim))
        return own or GOALS.get((self.which, self.head_dim))

    @property
    def wide(self) -> bool:
        """Whether warps share the head dim of dk and dv."""
        return self.which == "backward" and self.head_dim == 256

    @property
    def _flag(self) -> str:
        return str(self.dropout).lower()

    @staticmethod
    def _source(header: str, kernel: str, params: str) -> str:
        return (
            f'#include "{header}"\n'
            "namespace fuseformer {\n"
            f"template __global__ void {kernel}(const {params});\n"
            "}\n"
        )

    def __str__(self) -> str:
        options = " small" * self.small + " dropout" * self.dropout
        return f"{self.which} {self.dtype} {self.head_dim}{options}"


@dataclass(frozen=True)
class Result:
    """What the compiler made of a kernel."""

    registers: int
    spilled: int  # bytes per thread
    score: float | None = None
    edge_score: float | None = None


def nvcc() -> str:
    """Return the compiler of this environment's packages, else the one on the path."""
    package = Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13" / "bin" / "nvcc"
    found = str(package) if package.exists() else shutil.which("nvcc")
    if found is None:
        raise SystemExit("bench cuda: no nvcc; pip install '.[cuda]' brings one")
    return found


def compile_kernel(kernel: Kernel, architecture: int) -> bytes:
    """Return the cubin of a kernel, made from PTX for sm_80 as a usual build makes it.

    Raises `RuntimeError` with what nvcc said.
    """
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "kernel.cu", Path(folder) / "kernel.cubin"
        source.write_text(kernel.source)
        codes = f"arch=compute_80,code=sm_{architecture}"
        command = [nvcc(), "-std=c++17", "-O3", "-Werror", "all-warnings", "-gencode", codes]
        command += ["-cubin", f"-I{SOURCES}", str(source), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
        return target.read_bytes()


def measure(kernel: Kernel, architecture: int) -> Result:
    """Compile a kernel and read its binary."""
    binary = compile_kernel(kernel, architecture)
    registers, spilled = binaries.resources(binary)
    scores: list[float] = []
    if architecture in binaries.MACS_PER_CYCLE and kernel.which not in UNSCORED:
        rate = binaries.MACS_PER_CYCLE[architecture]
        loops = product_loops(binaries.disassemble(binary))
        scores = sorted(round(loop.cycles * rate / loop.macs, 3) for loop in loops)
    return Result(
        registers,
        spilled,
        scores[0] if scores else None,
        scores[-1] if len(scores) > 1 else None,
    )


def kernels(dtypes: list[str]) -> list[Kernel]:
    """Return every instantiation in these dtypes."""
    return [
        Kernel(which, dim, dtype, dropout, small)
        for (which, small), dims in PASSES.items()
        for dim, dtype, dropout in itertools.product(dims, dtypes, (False, True))
        if not (dropout and which in WITHOUT_DROPOUT)
    ]


def problems(results: dict[tuple[Kernel, int], Result]) -> list[str]:
    """Return what the goals and the rule against spills find wrong."""
    found = []
    for (kernel, architecture), result in results.items():
        if result.spilled:
            found.append(f"{kernel} on sm_{architecture}: {result.spilled} bytes spilled")
        goal = kernel.goal
        if architecture == 80 and not kernel.dropout and goal and (result.score or 9e9) > goal:
            found.append(f"{kernel} on sm_80: score {result.score}, asked {goal}")
    return found


def main(arguments: list[str]) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m bench cuda",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--arch", nargs="+", type=int, choices=ARCHITECTURES, default=[80])
    parser.add_argument("--dtype", nargs="+", choices=ELEMENTS, default=["bf16"])
    parser.add_argument("--workers", type=int, default=2, help="compilers at once (default 2)")
    parser.add_argument("--output", type=Path, help="JSON")
    asked = parser.parse_args(arguments)
    work = list(itertools.product(kernels(asked.dtype), asked.arch))
    with Progress() as progress, ThreadPoolExecutor(asked.workers) as pool:
        task = progress.add_task("compiling", total=len(work))
        results = {}
        for key, result in zip(work, pool.map(lambda key: measure(*key), work), strict=True):
            results[key] = result
            progress.update(task, advance=1)
    heads = (("regs", 5), ("spilled", 8), ("full", 8), ("edge", 8), ("ratio", 7), ("asked", 7))
    print(" " * 46 + "".join(f"{name:>{width}}" for name, width in (*heads, ("flash 2", 9))))
    for (kernel, architecture), r in results.items():
        ratio = r.edge_score / r.score if r.score and r.edge_score else None
        goal = kernel.goal
        flash = FLASH_ATTENTION_2.get((kernel.which, kernel.head_dim))
        if architecture != 80 or kernel.dropout:
            goal = flash = None
        shown = [(r.score, 8, 3), (r.edge_score, 8, 3), (ratio, 7, 2), (goal, 7, 2), (flash, 9, 3)]
        figures = "".join(f"{'' if f is None else f'{f:.{d}f}':>{w}}" for f, w, d in shown)
        name = f"{kernel} sm_{architecture}"
        print(f"{name:46}{r.registers:5}{r.spilled:8}{figures}")
    if asked.output:
        rows = [asdict(k) | {"sm": a} | asdict(r) for (k, a), r in results.items()]
        asked.output.write_text(json.dumps(rows, indent=1) + "\n")
        print(f"wrote {asked.output}")
    found = problems(results)
    for problem in found:
        print(f"FAULT {problem}", file=sys.stderr)
    return 1 if found else 0
