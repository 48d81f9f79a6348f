"""What the compiled kernels need: tiles, registers, shared memory, occupancy."""

import importlib
from dataclasses import dataclass

from ..extension import build

# Threads and bytes of shared memory of a multiprocessor (CUDA C++ programming guide, "Technical
# specifications per compute capability"); registers and the least share of a block are everywhere
# the same.
_MULTIPROCESSORS = {
    80: (2048, 164 * 1024),
    86: (1536, 100 * 1024),
    87: (1536, 164 * 1024),
    89: (1536, 100 * 1024),
    90: (2048, 228 * 1024),
    100: (2048, 228 * 1024),
    103: (2048, 228 * 1024),
    120: (1536, 100 * 1024),
    121: (1536, 100 * 1024),
}
_REGISTERS = 64 * 1024
_RESERVED_SHARED = 1024  # of each block, by the system


@dataclass(frozen=True)
class KernelRow:
    """One compiled kernel. `blocks` is how many fit a multiprocessor, `occupancy` their threads.

    `size` is the head dim, the width of the model, or the first products of a feed-forward block.
    """

    which: str
    dtype: str
    size: int
    activation: str | None  # "other" is any but relu, chosen when it runs
    dropout: bool
    block_m: int
    block_n: int
    threads: int
    shared_bytes: int
    registers: int
    stack_bytes: int
    blocks: int
    occupancy: float


def blocks_that_fit(architecture: int, threads: int, registers: int, shared_bytes: int) -> int:
    """Return how many blocks of a kernel fit a multiprocessor; registers come by 8 a thread."""
    most_threads, shared = _MULTIPROCESSORS[architecture]
    by_registers = _REGISTERS // (-(-registers // 8) * 8 * threads)
    return min(most_threads // threads, by_registers, shared // (shared_bytes + _RESERVED_SHARED))


def kernel_rows(architecture: int) -> list[KernelRow]:
    """Return the kernels with tiles compiled for an architecture, 80 for sm_80.

    Raises `ValueError` where `_host`, which knows their tiles, is missing, and for an architecture
    that was not compiled.
    """
    try:
        host = importlib.import_module("fuseformer._host")
    except ImportError as error:
        raise ValueError(
            f"kernels: fuseformer._host cannot be imported ({error}): it is built for one Python, "
            "install fuseformer again with this one"
        ) from error
    tiles = {(row["kernel"], row["size"]): row for row in host.tiles()}
    rows = []
    for kernel in build()["kernels"]:
        tile = tiles.get((kernel["kernel"], kernel["size"]))
        if kernel["architecture"] != architecture or tile is None:
            continue
        blocks = blocks_that_fit(
            architecture, tile["threads"], kernel["registers"], tile["shared_bytes"]
        )
        rows.append(
            KernelRow(
                kernel["kernel"],
                kernel["dtype"],
                kernel["size"],
                kernel["activation"],
                kernel["dropout"],
                tile["block_m"],
                tile["block_n"],
                tile["threads"],
                tile["shared_bytes"],
                kernel["registers"],
                kernel["stack_bytes"],
                blocks,
                blocks * tile["threads"] / _MULTIPROCESSORS[architecture][0],
            )
        )
    if not rows:
        compiled = ", ".join(build()["architectures"])
        raise ValueError(f"architecture: got {architecture}, expected one of {compiled}")
    return sorted(rows, key=lambda r: (r.which, r.size, r.dtype, r.activation or "", r.dropout))
