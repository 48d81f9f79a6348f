"""What is installed, how it was built, and what can run here."""

import importlib.metadata
import importlib.util
import platform
import warnings
from dataclasses import dataclass
from typing import Any

import torch

from . import extension
from ._version import __version__
from .backends import BACKENDS, Request, device_capability, refusal
from .cuda.tables import kernel_rows

_PACKAGES = ("torch", "triton", "numpy", "tokenizers", "safetensors", "sacrebleu", "rouge-score")


@dataclass(frozen=True)
class Device:
    """A device as torch names it, its kind, 80 for sm_80 or 0, and what it is."""

    name: str
    kind: str
    capability: int
    model: str


def devices() -> list[Device]:
    """Return the devices of this machine that backends are chosen for."""
    found = [Device("cpu", "cpu", 0, platform.machine())]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            model = torch.cuda.get_device_name(index)
            found.append(Device(f"cuda:{index}", "cuda", device_capability(index), model))
    return found


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def refusals(device: Device) -> dict[str, str | None]:
    """Return why each backend cannot run attention there, None where it can.

    That is in bfloat16 at head dim 64. A broken library is among the reasons, not warned of.
    """
    request = Request(
        "attention", device.kind, torch.bfloat16, head_dim=64, capability=device.capability
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {backend: refusal(backend, request) for backend in BACKENDS}


def library_problem() -> str | None:
    """Return why the compiled library cannot be used, or None, without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return extension.problem()


def survey() -> dict[str, Any]:
    """Return versions, the build, and for each device why each backend cannot run there.

    The reasons are those for attention in bfloat16 at head dim 64, None where a backend can run.
    Everything in it can be written as JSON.
    """
    kernels = ("kernels", "spills")
    build = {name: value for name, value in extension.build().items() if name not in kernels}
    return {
        "fuseformer": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {package: _version(package) for package in _PACKAGES},
        "build": build,
        "library_problem": library_problem(),
        "has_host_module": importlib.util.find_spec("fuseformer._host") is not None,
        "devices": [
            {
                "device": device.name,
                "model": device.model,
                "capability": device.capability or None,
                "backends": refusals(device),
            }
            for device in devices()
        ],
    }


def _describe_build(found: dict[str, Any]) -> list[str]:
    build = found["build"]
    said = {
        "none": "Python and Triton alone",
        "cpu": "with the C++ library for CPUs",
        "cuda": f"with CUDA {build['cuda']} for {', '.join(build['architectures'])}",
    }[build["mode"]]
    lines = [f"  {'built':12} {said}", *(f"  {'':12} {reason}" for reason in build["refused"])]
    if build["mode"] != "none":
        headers = f"against the headers of torch {build['torch']} by {build['compiler']}"
        lines.append(f"  {'':12} {headers}")
        lines.append(f"  {'library':12} {found['library_problem'] or 'loaded'}")
    return lines


def describe() -> str:
    """Return versions, devices, and which backends can run attention on each device and why not."""
    found = survey()
    lines = [f"fuseformer {__version__}, Python {found['python']}, {found['platform']}"]
    lines += [f"  {name:12} {v or 'not installed'}" for name, v in found["packages"].items()]
    lines += _describe_build(found)
    for device in found["devices"]:
        title = device["device"]
        if device["capability"]:
            title += f", {device['model']} sm_{device['capability']}"
        lines.append(f"backends for {title} (attention, bfloat16, head dim 64):")
        for backend, reason in device["backends"].items():
            lines.append(f"  {backend:12} {'can run' if reason is None else 'no: ' + reason}")
    return "\n".join(lines)


def describe_kernels(architecture: int) -> str:
    """Return a table of the CUDA C++ kernels with tiles compiled for an architecture.

    Raises `ValueError` where there are none.
    """
    if extension.build()["mode"] != "cuda":
        raise ValueError(
            "kernels: got an installation without CUDA C++ kernels; build it with "
            "FUSEFORMER_BUILD=cuda"
        )
    rows = kernel_rows(architecture)
    names = [
        " ".join(filter(None, (r.which, r.dtype, str(r.size), r.activation, "dropout" * r.dropout)))
        for r in rows
    ]
    width = max(map(len, names)) + 1
    lines = [
        f"{'':{width}}{'tile':>8}{'threads':>9}{'shared':>9}{'registers':>11}{'stack':>7}"
        f"{'blocks':>8}{'occupancy':>11}"
    ]
    for name, row in zip(names, rows, strict=True):
        tile = f"{row.block_m}x{row.block_n}"
        lines.append(
            f"{name:{width}}{tile:>8}{row.threads:9}{row.shared_bytes:9}{row.registers:11}"
            f"{row.stack_bytes:7}{row.blocks:8}{row.occupancy:11.0%}"
        )
    return "\n".join(lines)
