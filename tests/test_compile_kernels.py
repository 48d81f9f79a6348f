"""Every Triton kernel compiles for GPUs that are not here, without spills and within their limits.

A run takes, of every kernel and size of tile, one launch for each architecture, another one each
time. With FUSEFORMER_COMPILE_ALL=1 (`make compile-matrix`) it takes every launch that the kernel
files name, for every architecture, which is about twenty minutes of one core.
"""

import importlib
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from fuseformer.kernels.common import FAMILIES, KernelSpec
from triton.backends.compiler import GPUTarget

MODULES = ("attention", "decode", "feed_forward", "norm", "cross_entropy")
COMPILE_ALL = os.environ.get("FUSEFORMER_COMPILE_ALL") == "1"
#: Compute capability: KiB of shared memory that one program may have.
SHARED_LIMIT = {80: 163, 90: 227, 100: 227, 120: 99}
if COMPILE_ALL:
    SHARED_LIMIT |= {86: 99, 89: 99}
TENSOR_MEMORY_COLUMNS = 512
TENSOR_CORE = re.compile(r"\bmma\.sync|wgmma\.mma_async|tcgen05\.mma")
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def tensors(spec: KernelSpec) -> list[torch.Tensor]:
    return [value for value in spec.arguments.values() if isinstance(value, torch.Tensor)]


def half_precision(spec: KernelSpec) -> bool:
    return any(tensor.dtype in (torch.bfloat16, torch.float16) for tensor in tensors(spec))


def describe(spec: KernelSpec) -> str:
    """Return a name for a launch: its dtype, constants, optional tensors and compiler options."""
    dtype = next(t.dtype for t in tensors(spec) if t.is_floating_point())
    words = [spec.kernel.__name__.removesuffix("_kernel"), str(dtype).removeprefix("torch.")]
    for name, value in spec.arguments.items():
        if isinstance(value, torch.Tensor) and name in OPTIONAL:
            words.append(name.removesuffix("_ptr"))
        elif isinstance(value, str) or (name.isupper() and value is not False):
            words.append(f"{name}={value}")
    words += [f"{name.removeprefix('num_')}={value}" for name, value in spec.options.items()]
    return "-".join(words)


OPTIONAL = (
    "padding_ptr",
    "key_lengths",
    "cu_seqlens_q",
    "seed_ptr",
    "upstream_ptr",
    "bias_ptr",
    "slopes_ptr",
    "table_ptr",
)


def tile_class(spec: KernelSpec) -> tuple[Any, ...]:
    """Return what specs must share for one of them to stand for the others.

    Single precision attention is one class: it needs no tensor cores, and its products compile
    slowly.
    """
    arguments = spec.arguments
    name = spec.kernel.__name__
    if name.startswith("attention") and not half_precision(spec):
        return name, "single"
    width = arguments.get("BLOCK_D") or arguments.get("BLOCK_W")
    if width:
        return name, max(width, 32)
    # Kernels without products differ by how many values a thread owns.
    return name, arguments.get("ROWS"), arguments.get("BLOCK_N", 0) > 512


def chosen_specs(capability: int) -> Iterator[KernelSpec]:
    """Yield the specs to compile for an architecture: all, or one of each tile class in turn."""
    classes: dict[str, dict[str, KernelSpec]] = {}
    for module in MODULES:
        kernels = importlib.import_module(f"fuseformer.kernels.{module}")
        for spec in kernels.kernel_specs(FAMILIES[capability]):
            classes.setdefault(repr(tile_class(spec)), {})[describe(spec)] = spec
    for index, specs in enumerate(classes.values()):
        members = list(specs.values())
        turn = list(SHARED_LIMIT).index(capability) + index
        yield from members if COMPILE_ALL else [members[turn % len(members)]]


def stack_bytes(cubin: bytes, folder: Path) -> int:
    """Return the local memory of a kernel per thread: where ptxas puts what it spills."""
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    usage = subprocess.run(
        [CUOBJDUMP, "-res-usage", path], capture_output=True, text=True, check=True
    ).stdout
    found = re.findall(r"\b(?:STACK|LOCAL):(\d+)", usage)
    assert len(found) == 2, f"cuobjdump says something new: {usage}"
    return sum(map(int, found))


def faults(spec: KernelSpec, capability: int, folder: Path, **options: int) -> list[str]:
    """Compile `spec` and return what is wrong with the result, as phrases."""
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(spec.source(), target=target, options=spec.options | options)
    found = []
    spilled = stack_bytes(compiled.asm["cubin"], folder)
    if spilled:
        found.append(f"{spilled} bytes of registers spilled per thread")
    if compiled.metadata.shared > SHARED_LIMIT[capability] * 1024:
        found.append(f"{compiled.metadata.shared} bytes of shared memory")
    columns = getattr(compiled.metadata, "tmem_size", 0)
    if columns > TENSOR_MEMORY_COLUMNS:
        found.append(f"{columns} columns of tensor memory")
    if (
        half_precision(spec)
        and "tt.dot" in compiled.asm["ttir"]
        and not TENSOR_CORE.search(compiled.asm["ptx"])
    ):
        found.append("a product without tensor cores")
    return found


@pytest.mark.parametrize(
    ("capability", "spec"),
    [
        pytest.param(capability, spec, id=f"sm_{capability}-{describe(spec)}")
        for capability in SHARED_LIMIT
        for spec in chosen_specs(capability)
    ],
)
def test_a_kernel_compiles_without_spills(capability, spec, tmp_path):
    assert not faults(spec, capability, tmp_path)


def small_product() -> KernelSpec:
    """Return a launch with a product that compiles fast."""
    specs = importlib.import_module("fuseformer.kernels.attention").kernel_specs("sm_80")
    return next(spec for spec in specs if spec.arguments["BLOCK_D"] == 32)


def test_a_spill_is_seen(tmp_path):
    """The check must be able to fail: a kernel held to few registers has to spill."""
    assert any("spilled" in fault for fault in faults(small_product(), 80, tmp_path, maxnreg=64))


def test_too_much_shared_memory_is_seen(tmp_path, monkeypatch):
    monkeypatch.setitem(SHARED_LIMIT, 80, 1)
    assert any("shared" in fault for fault in faults(small_product(), 80, tmp_path))


def test_a_product_without_tensor_cores_is_seen(tmp_path, monkeypatch):
    """A pattern that finds nothing stands for a product that the compiler split into scalars."""
    monkeypatch.setitem(globals(), "TENSOR_CORE", re.compile(r"\bno such instruction\b"))
    assert "a product without tensor cores" in faults(small_product(), 80, tmp_path)
