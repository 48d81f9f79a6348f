"""Every Triton kernel compiles for GPUs that are not here, without spills and within their limits.

A run compiles each spec of each kernel for one of the architectures in turn; with
FUSEFORMER_COMPILE_ALL=1 each for all of them, which takes minutes.
"""

import importlib
import os
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import triton
from fuseformer.kernels.common import FAMILIES, KernelSpec
from triton.backends.compiler import GPUTarget

MODULES = ("attention", "feed_forward", "norm", "cross_entropy")
#: Compute capability: KiB of shared memory that one program may have.
SHARED_LIMIT = {80: 163, 90: 227, 100: 227, 120: 99}
TENSOR_MEMORY_COLUMNS = 512
TENSOR_CORE = re.compile(r"\bmma\.sync|wgmma\.mma_async|tcgen05\.mma")
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def describe(spec: KernelSpec) -> str:
    constants = {name: value for name, value in spec.arguments.items() if name.isupper()}
    dtypes = {str(v.dtype) for v in spec.arguments.values() if isinstance(v, torch.Tensor)}
    return f"{spec.kernel.__name__} {sorted(dtypes)} {constants} {spec.options}"


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


def faults(spec: KernelSpec, capability: int, folder: Path) -> list[str]:
    """Compile `spec` and return what is wrong with the result, as phrases."""
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(spec.source(), target=target, options=spec.options)
    found = []
    spilled = stack_bytes(compiled.asm["cubin"], folder)
    if spilled:
        found.append(f"{spilled} bytes of registers spilled per thread")
    if compiled.metadata.shared > SHARED_LIMIT[capability] * 1024:
        found.append(f"{compiled.metadata.shared} bytes of shared memory")
    columns = getattr(compiled.metadata, "tmem_size", 0)
    if columns > TENSOR_MEMORY_COLUMNS:
        found.append(f"{columns} columns of tensor memory")
    tensors = [a for a in spec.arguments.values() if isinstance(a, torch.Tensor)]
    if (
        "tt.dot" in compiled.asm["ttir"]
        and any(t.dtype in (torch.float16, torch.bfloat16) for t in tensors)
        and not TENSOR_CORE.search(compiled.asm["ptx"])
    ):
        found.append("a product without tensor cores")
    return found


def specs_for(module: str, capability: int) -> Iterator[KernelSpec]:
    """Yield the module's specs for an architecture: all, or every fourth of each kernel."""
    kernels = importlib.import_module(f"fuseformer.kernels.{module}")
    turn = list(SHARED_LIMIT).index(capability)
    seen: Counter[str] = Counter()
    for spec in kernels.kernel_specs(FAMILIES[capability]):
        position = seen[spec.kernel.__name__]
        seen[spec.kernel.__name__] += 1
        if os.environ.get("FUSEFORMER_COMPILE_ALL") or position % len(SHARED_LIMIT) == turn:
            yield spec


@pytest.mark.parametrize("capability", SHARED_LIMIT)
@pytest.mark.parametrize("module", MODULES)
def test_kernels_compile_without_spills(module, capability, tmp_path):
    specs = list(specs_for(module, capability))
    assert specs
    wrong = {describe(spec): faults(spec, capability, tmp_path) for spec in specs}
    failed = [f"{name}: {', '.join(found)}" for name, found in wrong.items() if found]
    assert not failed, "\n".join(failed)


def test_a_spill_is_seen(tmp_path):
    """The check must be able to fail: a kernel held to few registers has to spill."""
    spec = next(specs_for("attention", 80))
    starved = KernelSpec(spec.kernel, spec.arguments, spec.options | {"maxnreg": 64})
    assert any("spilled" in fault for fault in faults(starved, 80, tmp_path))
