"""One small forward and backward pass on every backend that can run here, judged and reported."""

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from . import extension, reference
from .info import Device, devices, library_problem, refusals
from .ops.attention import attention
from .testing import assert_close_to_reference

_SHAPE = (2, 2, 48, 64)  # batch, heads, tokens, head dim


@dataclass(frozen=True)
class Finding:
    """What became of a backend on a device: "ok", "cannot run" or "FAILED", and the details."""

    device: str
    backend: str
    status: str
    detail: str

    def __str__(self) -> str:
        return f"{self.device:8} {self.backend:10} {self.status:11} {self.detail}"


def _inputs(device: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(_SHAPE, generator=generator).to(device, torch.bfloat16) for _ in range(4)]


def _passes(inputs: list[Tensor], dtype: torch.dtype, backend: str | None) -> tuple[Tensor, ...]:
    """Return output and gradients of a causal call with padding, for None by plain PyTorch."""
    q, k, v = (x.to(dtype).requires_grad_() for x in inputs[:3])
    lengths = torch.tensor([_SHAPE[2] - 11, 0], dtype=torch.int32, device=q.device)
    if backend is None:
        out = reference.attention(q, k, v, causal="top_left", key_lengths=lengths)[0]
    else:
        out = attention(q, k, v, causal=True, key_lengths=lengths, backend=backend)
    return (out, *torch.autograd.grad(out, (q, k, v), inputs[3].to(dtype)))


def _examine(device: Device, backend: str, refused: str | None) -> Finding:
    def finding(status: str, detail: str) -> Finding:
        return Finding(device.name, backend, status, detail)

    if refused is not None:
        return finding("cannot run", refused)
    # Whatever a backend raises is what its user has to be told.
    try:
        inputs = _inputs(torch.device(device.name))
        begin = time.perf_counter()
        got = [x.cpu() for x in _passes(inputs, torch.bfloat16, backend)]
        seconds = time.perf_counter() - begin
        exact, low = (_passes(inputs, dtype, None) for dtype in (torch.float64, torch.bfloat16))
        for name, mine, right, plain in zip(
            ("out", "dq", "dk", "dv"), got, exact, low, strict=True
        ):
            factor = 2.0 if name == "out" else 3.0
            assert_close_to_reference(mine, right.cpu(), plain.cpu(), factor=factor, name=name)
    except Exception as error:
        return finding("FAILED", f"{type(error).__name__}: {' '.join(str(error).split())}")
    return finding("ok", f"forward and backward in {seconds:.2f} s, compilation included")


def examine() -> list[Finding]:
    """Return what became of the compiled library, and of every backend on every device."""
    found = []
    if extension.build()["mode"] != "none":
        problem = library_problem()
        status = "ok" if problem is None else "FAILED"
        found.append(Finding("", "library", status, problem or "the compiled library is loaded"))
    for device in devices():
        found += [_examine(device, *item) for item in refusals(device).items()]
    return found
