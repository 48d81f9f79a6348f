"""How fast the emulator runs attention's forward pass, which is verified first, on one core.

``OMP_NUM_THREADS=1 python tests/support/emulator_speed.py``. Multiply-adds: 2 * heads * queries *
keys * head dim, one without masks; medians of five.
"""

import statistics
import time

import torch
from attention_checks import Case, check_dense
from emulated import Kernels
from emulator_build import build

HEADS, LENGTH, CALLS = 4, 512, 5


def main() -> None:
    """Build the emulator, verify it, and print a line for each head dim."""
    kernels = Kernels(build("plain"))
    kernels.emulator.set_options(False, 1, "late", "exact", 80)
    for head_dim in (64, 128):
        check_dense(kernels, Case((2, 2), (70, 90), head_dim, torch.bfloat16))
        q, k, v = (torch.randn(1, HEADS, LENGTH, head_dim).to(torch.bfloat16) for _ in range(3))
        options = (*(None,) * 6, "none", -1, -1, 0.0, head_dim**-0.5, 0.0)
        seconds = []
        for _ in range(CALLS):
            begin = time.perf_counter()
            kernels.attention_forward(q, k, v, *options)
            seconds.append(time.perf_counter() - begin)
        billions = 2 * HEADS * LENGTH**2 * head_dim / statistics.median(seconds) / 1e9
        print(f"head dim {head_dim}: {billions:.2f} billion multiply-adds a second")


if __name__ == "__main__":
    main()
