"""The compiled ops for GPUs: whether they are there, and what they were compiled for."""

from functools import lru_cache
from typing import Any

import torch

from .. import extension


def problem() -> str | None:
    """Return why the compiled ops cannot be used, or None; warn where the library is broken."""
    if extension.build()["mode"] != "cuda":
        return (
            "this installation was built without the CUDA C++ kernels (build it with "
            "FUSEFORMER_BUILD=cuda)"
        )
    return extension.problem()


def ops() -> Any:
    """Return the compiled ops. Raises `RuntimeError` where they cannot be used."""
    reason = problem()
    if reason is not None:
        raise RuntimeError(f"fuseformer: {reason}")
    return torch.ops.fuseformer_cuda


@lru_cache(maxsize=1)
def driver_problem() -> str | None:
    """Return why the driver cannot run what was compiled, or None."""
    compiled = ops()
    driver, runtime = compiled.driver_version(), compiled.runtime_version()
    if driver // 1000 >= runtime // 1000:
        return None
    have, want = (f"{v // 1000}.{v % 1000 // 10}" for v in (driver, runtime))
    return f"the driver knows CUDA {have}, the kernels were compiled with {want}: update the driver"


def runs_on(capability: int, architectures: list[str]) -> bool:
    """Return whether code for `architectures` runs on a GPU: 86 for sm_86.

    Binaries run on later GPUs of their major version, PTX is compiled for any later one.
    """
    for name in architectures:
        number = int(name.removesuffix("+PTX"))
        same_major = number // 10 == capability // 10
        if number <= capability and (same_major or name.endswith("+PTX")):
            return True
    return False


def refusal(capability: int) -> str | None:
    """Return why the compiled kernels cannot run on a GPU of this capability, or None."""
    reason = problem()
    if reason is not None:
        return reason
    compiled = extension.build()["architectures"]
    if not runs_on(capability, compiled):
        return (
            f"the CUDA C++ kernels were compiled for {', '.join(compiled)}, not for sm_{capability}"
        )
    return driver_problem()


# Compiled graphs take it for a constant: nothing of it can be traced.
refusal._dynamo_marked_constant = True  # type: ignore[attr-defined]
