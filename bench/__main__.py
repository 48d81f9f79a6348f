"""``python -m bench NAME``: verify, time, print, and write JSON and a plot.

``python -m bench scores`` and ``python -m bench bytes`` look at the Triton kernels without a GPU,
``python -m bench cuda`` at those in CUDA C++, ``python -m bench schedule`` at whole launches of
these, ``python -m bench build`` at what it takes to build the package; each says what it does with
``--help``.
"""

import argparse
import importlib
import sys
from pathlib import Path

import torch

from .report import save, table

BENCHMARKS = ("attention", "feed_forward", "layer", "train_step")
#: Commands with arguments of their own, and their modules.
MEASURES = {
    "scores": "scores",
    "bytes": "traffic",
    "cuda": "cuda_kernels",
    "build": "build",
    "versions": "versions",
    "schedule": "schedule",
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main() -> int:
    """Run the benchmark that the command line names."""
    if sys.argv[1:] and sys.argv[1] in MEASURES:
        module = importlib.import_module(f".{MEASURES[sys.argv[1]]}", __package__)
        return module.main(sys.argv[2:])
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("benchmark", choices=BENCHMARKS)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: checks, not figures")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    parser.add_argument("--output", type=Path, default=Path("runs/bench"), help="for JSON and PNG")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this PyTorch sees no CUDA device")
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    module = importlib.import_module(f".{arguments.benchmark}", __package__)
    rows = module.run(arguments.quick, arguments.device, DTYPES[arguments.dtype])
    print(f"{arguments.benchmark} on {arguments.device}, {arguments.dtype}; every result verified")
    print(f"FLOP: {module.FLOP_FORMULA}")
    print(table(rows))
    settings = {k: str(v) for k, v in vars(arguments).items()}
    for path in save(arguments.benchmark, rows, module.FLOP_FORMULA, settings, arguments.output):
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
