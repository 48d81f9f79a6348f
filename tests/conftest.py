"""Fixtures that more than one test file needs."""

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# What test files share lies in its own folder: the repository root stays off the path, where
# `kernels` would shadow somebody else's package.
sys.path.insert(0, str(Path(__file__).parent / "support"))


# A search of configs would write what it finds into the user's cache.
os.environ.pop("FUSEFORMER_AUTOTUNE", None)


def _offer_bench() -> None:
    """Let test files import `bench`, which is not installed."""
    folder = Path(__file__).parent.parent / "bench"
    spec = importlib.util.spec_from_file_location(
        "bench", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    sys.modules["bench"] = importlib.util.module_from_spec(spec)


_offer_bench()


@pytest.fixture(scope="module")
def triton_on_cpu() -> Iterator[None]:
    """Execute every Triton launch on the CPU, out-of-bounds accesses and races being failures.

    What `torch.empty` returns is filled with NaN meanwhile: memory that nobody wrote may hold what
    one expects, and does so on most runs.

    Triton is patched for the whole process while the session is open, and `choose_backend` takes
    the "triton" backend for CPU tensors where it is asked for by name. The session also leaves a
    `torch.cuda` behind that claims a GPU, which `torch.compile` believes: it is put back here.

    Its executor has LLVM print modules in the generic form, and believes that this lasts. Compiling
    for gfx942 links with lld, which resets LLVM's options: they are set anew for every test file.
    """
    import torch
    from ttsem import mlir, sanitize

    from fuseformer import backends

    mlir._generic_printing_enabled[0] = False
    served, cuda = set(backends.TRITON_DEVICES), dict(vars(torch.cuda))
    with sanitize.session(80, "<pytest>", cuda_is_cpu=False, races="raise"):
        backends.TRITON_DEVICES.add("cpu")
        deterministic = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True)
        assert torch.utils.deterministic.fill_uninitialized_memory
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(deterministic)
            backends.TRITON_DEVICES.clear()
            backends.TRITON_DEVICES.update(served)
            vars(torch.cuda).update(cuda)
