"""What is installed and what can run here."""

import importlib.metadata
import platform

import torch

from ._version import __version__
from .backends import BACKENDS, Request, device_capability, refusal
from .cuda.library import build
from .cuda.tables import kernel_rows

_PACKAGES = ("torch", "triton", "numpy", "tokenizers", "safetensors", "sacrebleu", "rouge-score")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def describe() -> str:
    """Return versions, devices, and which backends can run attention on each device and why not."""
    lines = [f"fuseformer {__version__}, Python {platform.python_version()}, {platform.platform()}"]
    lines += [f"  {package:12} {_version(package)}" for package in _PACKAGES]
    built = build()
    if built["mode"] == "none":
        lines.append("  CUDA C++     not built")
    else:
        compiled = ", ".join(built["architectures"])
        lines.append(f"  CUDA C++     built with CUDA {built['cuda']} for {compiled}")
    devices = {"cpu": ("cpu", 0)}
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            name = f"{torch.cuda.get_device_name(index)} sm_{device_capability(index)}"
            devices[f"cuda:{index}, {name}"] = ("cuda", device_capability(index))
    for title, (device, capability) in devices.items():
        lines.append(f"backends for {title} (attention, bfloat16, head dim 64):")
        request = Request("attention", device, torch.bfloat16, head_dim=64, capability=capability)
        for backend in BACKENDS:
            reason = refusal(backend, request)
            lines.append(f"  {backend:12} {'can run' if reason is None else 'no: ' + reason}")
    return "\n".join(lines)


def describe_kernels(architecture: int) -> str:
    """Return a table of the CUDA C++ attention kernels compiled for an architecture.

    Raises `ValueError` where there are none.
    """
    if build()["mode"] == "none":
        raise ValueError(
            "kernels: got an installation without CUDA C++ kernels; build it with "
            "FUSEFORMER_BUILD=cuda"
        )
    lines = [
        f"{'':34}{'tile':>9}{'threads':>9}{'shared':>9}{'registers':>11}{'stack':>7}{'blocks':>8}"
        f"{'occupancy':>11}"
    ]
    for row in kernel_rows(architecture):
        name = f"{row.which} {row.dtype} {row.head_dim}{' dropout' * row.dropout}"
        tile = f"{row.block_m}x{row.block_n}"
        lines.append(
            f"{name:34}{tile:>9}{row.threads:9}{row.shared_bytes:9}{row.registers:11}"
            f"{row.stack_bytes:7}{row.blocks:8}{row.occupancy:11.0%}"
        )
    return "\n".join(lines)
