"""The blocks of the CUDA C++ forward launches in grid order, with the tiles and binaries that ship.

Tiles come from `csrc/host.cpp`, which names those of the traits, registers and the cost of a masked
step beside a full one from the stored figures of ``python -m bench cuda``. A full step is the unit
of time. Where control bits cannot be decoded (sm_100, sm_120), the cost is that of sm_80.
"""

import importlib.util
import json
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pybind11

from fuseformer.cuda.tables import blocks_that_fit

from .simulator import Step

ROOT = Path(__file__).parents[1]
FIGURES = Path(__file__).parent / "results" / "cuda_kernels.json"
#: Multiprocessors: A100, RTX 3090, RTX 4090, H100 SXM, B200, RTX 5090.
MULTIPROCESSORS = {80: 108, 86: 84, 89: 128, 90: 132, 100: 148, 120: 170}


@cache
def tiles() -> dict[tuple[str, int], dict[str, Any]]:
    """Return the tiles of the kernels as `csrc/host.cpp`, compiled now, names them.

    Raises `RuntimeError` with what the compiler said, or where there is none.
    """
    if (compiler := shutil.which("g++")) is None:
        raise RuntimeError("bench schedule: tiles are read through g++: install a C++ compiler")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "_host.so"
        headers = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
        command = [compiler, "-std=c++17", "-g0", "-shared", "-fPIC", *headers]
        command += [str(ROOT / "csrc" / "host.cpp"), "-o", str(library)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
        spec = importlib.util.spec_from_file_location("_host", library)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return {(row["kernel"], row["size"]): row for row in module.tiles()}


@cache
def _figures() -> list[dict[str, Any]]:
    return json.loads(FIGURES.read_text())


def figure(which: str, size: int, architecture: int) -> dict[str, Any]:
    """Return the stored figures of a kernel in bfloat16 without dropout."""
    asked = {"which": which, "head_dim": size, "sm": architecture, "dtype": "bf16"}
    asked |= {"dropout": False, "small": False}
    return next(row for row in _figures() if asked.items() <= row.items())


@dataclass(frozen=True)
class Launch:
    """A forward launch. `size` is the head dim, or the width of the model."""

    kernel: str  # "forward", "feed-forward" or "linear"
    size: int
    rows: int  # queries, or tokens
    columns: int  # keys, or hidden units
    heads: int = 1  # times the batch
    causal: bool = False
    bottom_right: bool = False
    window: int | None = None  # to the left, of a causal mask

    def __str__(self) -> str:
        mask = f" causal{' bottom-right' * self.bottom_right}" if self.causal else ""
        window = "" if self.window is None else f" window {self.window}"
        heads = f" x {self.heads} heads" if self.kernel == "forward" else ""
        return f"{self.kernel} {self.size}: {self.rows} x {self.columns}{heads}{mask}{window}"

    @property
    def _tile(self) -> dict[str, Any]:
        return tiles()[self.kernel, 1 if self.kernel == "linear" else self.size]

    def slots(self, architecture: int) -> int:
        """Return how many blocks the whole GPU holds at once."""
        tile = self._tile
        size = 128 if self.kernel == "linear" else self.size
        registers = figure(self.kernel, size, architecture)["registers"]
        fit = blocks_that_fit(architecture, tile["threads"], registers, tile["shared_bytes"])
        return MULTIPROCESSORS[architecture] * fit

    def masked_cost(self, architecture: int) -> float:
        """Return the cycles of a step with a mask over those of one without."""
        if self.kernel != "forward":
            return 1.0
        row = figure("forward", self.size, architecture)
        if row["score"] is None:
            row = figure("forward", self.size, 80)
        return (row["edge_score"] or row["score"]) / row["score"]

    def blocks(self, architecture: int) -> Iterator[list[Step]]:
        """Yield the steps of each block in grid order."""
        block_m, block_n = self._tile["block_m"], self._tile["block_n"]
        count = -(-self.rows // block_m)
        if self.kernel == "linear":
            # A step is of 64 columns of the input, which are those of the model.
            for _ in range(count * -(-self.columns // block_n)):
                yield [(None, 0)] * -(-self.size // 64)
        elif self.kernel == "feed-forward":
            for _ in range(count):
                yield [(None, 0)] * -(-self.columns // block_n)
        else:
            masked = self.masked_cost(architecture)
            head = [self._attend(row * block_m, masked) for row in reversed(range(count))]
            for _ in range(self.heads):
                yield from head

    def _attend(self, row: int, masked: float) -> list[Step]:
        """Return the steps of a block of queries: those that hide something cost `masked`."""
        block_m, block_n = self._tile["block_m"], self._tile["block_n"]
        first = row + (self.columns - self.rows) * self.bottom_right
        last = first + min(block_m, self.rows - row) - 1
        right = 0 if self.causal else self.columns + self.rows
        left = self.columns + self.rows if self.window is None else self.window
        begin, end = max(0, first - left), min(self.columns, last + right + 1)
        steps: list[Step] = []
        for key in range(begin // block_n * block_n, max(end, 0), block_n):
            full = key >= last - left and key + block_n <= min(self.columns, first + right + 1)
            steps.append((None, 0, 1.0 if full else masked))
        return steps
