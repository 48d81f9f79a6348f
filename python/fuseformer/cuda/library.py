"""The compiled library: whether it is there, what it was compiled for, and its ops."""

import json
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

_FOLDER = Path(__file__).parents[1]


@lru_cache(maxsize=1)
def build() -> dict[str, Any]:
    """Return what was decided when the package was built.

    "mode" is "none" or "cuda", "architectures" the GPU architectures compiled, "cuda" the version
    of the toolkit, "kernels" registers and stack bytes of each kernel.
    """
    file = _FOLDER / "_build.json"
    if not file.exists():
        return {"mode": "none", "architectures": [], "cuda": None, "kernels": []}
    found: dict[str, Any] = json.loads(file.read_text())
    return found


@lru_cache(maxsize=1)
def problem() -> str | None:
    """Return why the compiled ops cannot be used, or None; warn where the library is broken."""
    if build()["mode"] == "none":
        return (
            "this installation was built without the CUDA C++ kernels (build it with "
            "FUSEFORMER_BUILD=cuda)"
        )
    found = sorted(_FOLDER.glob("_C.*so"))
    if not found:
        reason = "the compiled library _C is missing from the package"
    else:
        try:
            torch.ops.load_library(str(found[0]))
            return None
        except OSError as error:
            said = error.__cause__ or error
            reason = f"the compiled library {found[0].name} cannot be loaded: {said}"
    warnings.warn(f"fuseformer: {reason}; other backends serve instead", stacklevel=2)
    return reason


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
    compiled = build()["architectures"]
    if not runs_on(capability, compiled):
        return (
            f"the CUDA C++ kernels were compiled for {', '.join(compiled)}, not for sm_{capability}"
        )
    return driver_problem()


# Compiled graphs take it for a constant: nothing of it can be traced.
refusal._dynamo_marked_constant = True  # type: ignore[attr-defined]
