"""The launches that every kernel file names for the compiler, as rows of a table.

A launch has a name that says what is asked for (kernel, dtype, constants, options), and a config
that says how it is done (tiles, warps, stages). A tuned config keeps the name, so that its numbers
can be held against those of the config before it.
"""

import hashlib
import importlib
import pkgutil
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from fuseformer.kernels.common import FAMILIES, KernelSpec

from fuseformer import kernels

#: What stands for AMD's gfx942 where architectures are compute capabilities.
GFX942 = 942
#: Compute capability: KiB of shared memory that one program may have.
SHARED_LIMIT = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99, GFX942: 64}
#: Arguments that change the kernel by being there.
OPTIONAL = (
    "padding_ptr",
    "key_lengths",
    "cu_seqlens_q",
    "seed_ptr",
    "upstream_ptr",
    "bias_ptr",
    "slopes_ptr",
    "sinks_ptr",
    "table_ptr",
    "dlse_ptr",
    "b_ptr",
    "pre_ptr",
    "b1_ptr",
    "b2_ptr",
    "db1_ptr",
    "act_ptr",
    "loss_ptr",
    "total_ptr",
    "dtotal_ptr",
    "mean_ptr",
    "residual_ptr",
    "dbias_ptr",
    "dx_ptr",
    "window_left",
    "window_right",
    "softcap",
    "label_smoothing",
    "z_loss",
)
_CONFIG = re.compile(r"(BLOCK|EDGE)_(?!D$|W$|O$)|(BLOCK|BLOCKS|ROWS|STEP|GROUP_M|SPLIT|SPLITS)$")
_DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Launch:
    """A spec with its name in parts; `constants` and `options` are what is asked for."""

    spec: KernelSpec
    kernel: str
    dtype: str
    constants: dict[str, Any]
    options: tuple[str, ...]
    config: dict[str, int]

    @property
    def words(self) -> list[str]:
        shown = [
            (k, v)
            for k, v in self.constants.items()
            if v is not False and v is not None and v != "ieee"
        ]
        constants = [k if v is True else f"{k}={v}" for k, v in shown]
        return [self.kernel, self.dtype, *constants, *self.options]


def architecture(capability: int) -> str:
    """Return the name of an architecture, such as "sm_80"."""
    return "gfx942" if capability == GFX942 else f"sm_{capability}"


def capability_of(architecture: str) -> int:
    """Return what `architecture` has named."""
    return int(architecture.removeprefix("sm_").removeprefix("gfx"))


def tensors(spec: KernelSpec) -> list[torch.Tensor]:
    return [value for value in spec.arguments.values() if isinstance(value, torch.Tensor)]


def half_precision(spec: KernelSpec) -> bool:
    return any(tensor.dtype in (torch.bfloat16, torch.float16) for tensor in tensors(spec))


def describe(spec: KernelSpec) -> Launch:
    """Take a launch apart."""
    dtype = next(t.dtype for t in tensors(spec) if t.is_floating_point())
    upper = {k: v for k, v in spec.arguments.items() if k.isupper()}
    given = [k for k in OPTIONAL if spec.arguments.get(k) is not None]
    return Launch(
        spec,
        spec.kernel.__name__.removesuffix("_kernel"),
        _DTYPES[dtype],
        {k: v for k, v in upper.items() if not _CONFIG.match(k)},
        tuple(name.removesuffix("_ptr") for name in given),
        {k: v for k, v in upper.items() if _CONFIG.match(k)}
        | {k.removeprefix("num_"): v for k, v in spec.options.items()},
    )


def _signature(spec: KernelSpec) -> str:
    """Return what the compiler specialises on, the kernel's own text left out."""
    source = spec.source()
    parts = (source.signature, source.constants, source.attrs, spec.options)
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def modules() -> Iterator[Any]:
    """Yield every kernel file that names launches."""
    for found in pkgutil.iter_modules(kernels.__path__):
        module = importlib.import_module(f"{kernels.__name__}.{found.name}")
        if getattr(vars(module).get("kernel_specs"), "__module__", None) == module.__name__:
            yield module


@cache
def launches(capability: int) -> dict[str, Launch]:
    """Return every distinct launch for an architecture by name.

    Names that two launches share get their config, and if need be a hash of the signature.
    """
    distinct: dict[tuple[str, str], Launch] = {}
    for module in modules():
        for spec in module.kernel_specs(FAMILIES[capability]):
            launch = describe(spec)
            distinct.setdefault((launch.kernel, _signature(spec)), launch)
    names = {key: " ".join(launch.words) for key, launch in distinct.items()}
    for extend in (
        lambda key: " ".join(f"{k}={v}" for k, v in distinct[key].config.items()),
        lambda key: key[1][:6],
    ):
        counts = list(names.values())
        names = {
            key: name if counts.count(name) == 1 else f"{name} {extend(key)}"
            for key, name in names.items()
        }
    return {name: distinct[key] for key, name in names.items()}
