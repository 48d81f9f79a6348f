"""What is installed and what can run here."""

import importlib.metadata
import platform

import torch

from ._version import __version__
from .backends import BACKENDS, Request, refusal

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
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices.append("cuda")
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            lines.append(
                f"  cuda:{index}       {torch.cuda.get_device_name(index)} sm_{major}{minor}"
            )
    for device in devices:
        lines.append(f"backends for {device} tensors (attention, bfloat16, head dim 64):")
        request = Request("attention", device, torch.bfloat16, head_dim=64)
        for backend in BACKENDS:
            reason = refusal(backend, request)
            lines.append(f"  {backend:12} {'can run' if reason is None else 'no: ' + reason}")
    return "\n".join(lines)
