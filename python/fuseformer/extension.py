"""The compiled library `_C`: how this installation was built, and whether the library loads."""

import json
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

_FOLDER = Path(__file__).parent


@lru_cache(maxsize=1)
def build() -> dict[str, Any]:
    """Return what was decided when the package was built.

    "mode" is "none", "cpu" or "cuda", "refused" says why no mode with more was taken,
    "architectures" names the GPU architectures compiled, "cuda" the version of the toolkit, "torch"
    that of the headers, "compiler" the C++ compiler, "kernels" has registers and stack bytes of
    each attention kernel, "spills" the kernels whose registers did not suffice.
    """
    file = _FOLDER / "_build.json"
    found: dict[str, Any] = {"mode": "none", "refused": [], "architectures": []}
    found |= {"cuda": None, "torch": None, "compiler": None, "kernels": [], "spills": []}
    return found | json.loads(file.read_text()) if file.exists() else found


@lru_cache(maxsize=1)
def problem() -> str | None:
    """Load the library; return why it cannot be used, or None. Warn where it should be there."""
    if build()["mode"] == "none":
        return "this installation was built without compiled libraries (FUSEFORMER_BUILD=none)"
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
