"""Launches of the CUDA C++ kernels in the emulator, with torch tensors.

`kernels` mirrors `fuseformer.kernels.attention`: the same functions with the same arguments.
"""

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fuseformer.philox import dropout_scale, dropout_threshold

_SHOWN = 20


class EmulatorError(AssertionError):
    """What kernels did wrong: the errors of a report, with their lines."""


def with_lines(errors: dict[str, int], library: str) -> str:
    """Return the errors of a report, places in the library as lines of the source."""
    places = sorted({place for error in errors for place in re.findall(r"\+(0x[0-9a-f]+)", error)})
    command = ["addr2line", "--inlines", "--addresses", "--exe", library, *places]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines: dict[str, str] = {}
    for part in said.split("0x")[1:]:
        address, *found = part.splitlines()
        # The innermost line is mostly of a primitive: the next ones say who has called it.
        names = ["/".join(line.split(" ")[0].split("/")[-2:]) for line in found[:3]]
        lines[f"0x{int(address, 16):x}"] = " in ".join(names)
    shown = [
        f"{count} x " + re.sub(r"\+(0x[0-9a-f]+)", lambda m: lines[m[1]], error)
        for error, count in sorted(errors.items(), key=lambda item: -item[1])
    ]
    more = [f"and {len(shown) - _SHOWN} more"] if len(shown) > _SHOWN else []
    return "\n".join(shown[:_SHOWN] + more)


class Memory:
    """Copies of tensors in the memory of the emulator, while a launch is made."""

    def __init__(self, emulator: ModuleType) -> None:
        self.emulator = emulator
        self.copies: list[tuple[Tensor, int]] = []

    def place(self, tensor: Tensor, *, written: bool = True) -> int:
        """Return where a copy of a tensor's storage is; without `written`, as much memory."""
        assert tensor.storage_offset() == 0
        size = tensor.untyped_storage().nbytes()
        source = tensor.untyped_storage().data_ptr() if written else 0
        address = self.emulator.allocate(max(size, 1), source)
        self.copies.append((tensor, address))
        return address

    def fetch(self, *tensors: Tensor) -> None:
        """Copy back what kernels have written."""
        for tensor, address in self.copies:
            if any(tensor is wanted for wanted in tensors):
                storage = tensor.untyped_storage()
                self.emulator.copy(storage.data_ptr(), address, storage.nbytes())


class Kernels:
    """The attention kernels in an emulator that was built in some mode."""

    def __init__(self, emulator: ModuleType) -> None:
        self.emulator = emulator
        self.counters: dict[str, int] = {}

    @contextmanager
    def _memory(self) -> Iterator[Memory]:
        self.emulator.report()
        try:
            yield Memory(self.emulator)
            report = self.emulator.report()
        finally:
            self.emulator.release_all()
        self.counters = report["counters"]
        if report["errors"]:
            raise EmulatorError(with_lines(report["errors"], self.emulator.__file__))

    def _head_tensor(self, memory: Memory, x: Tensor, *, written: bool = True) -> Any:
        found = self.emulator.HeadTensor()
        found.data = memory.place(x, written=written)
        if x.dim() == 4:
            found.batch_stride, found.head_stride, found.row_stride, _ = x.stride()
        else:
            found.batch_stride = 0
            found.row_stride, found.head_stride, _ = x.stride()
        return found

    def _params(
        self, memory: Memory, q: Tensor, k: Tensor, v: Tensor, call: SimpleNamespace
    ) -> Any:
        params = self.emulator.AttentionParams()
        params.q, params.k, params.v = (self._head_tensor(memory, x) for x in (q, k, v))
        heads_dim = 1
        params.heads = q.shape[heads_dim]
        params.group = q.shape[heads_dim] // k.shape[heads_dim]
        if call.packing is None:
            params.batch, params.queries, params.keys = q.shape[0], q.shape[2], k.shape[2]
        else:
            cu_q, cu_k, params.queries, params.keys = call.packing
            params.batch = len(cu_q) - 1
            params.cu_seqlens_q, params.cu_seqlens_k = memory.place(cu_q), memory.place(cu_k)
        if call.key_lengths is not None:
            params.key_lengths = memory.place(call.key_lengths)
        unbounded = self.emulator.NO_WINDOW
        right = 0 if call.causal != "none" else call.window_right
        params.window_left = call.window_left if call.window_left >= 0 else unbounded
        params.window_right = right if right >= 0 else unbounded
        params.bottom_right = call.causal == "bottom_right"
        params.scale = call.scale
        if call.dropout_p:
            params.seed = memory.place(call.seed.reshape(1))
            params.dropout_threshold = dropout_threshold(call.dropout_p)
            params.dropout_scale = dropout_scale(call.dropout_p)
        return params

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, call: SimpleNamespace
    ) -> tuple[Tensor, Tensor]:
        packed = call.packing is not None
        out = torch.zeros_like(q) if packed else torch.full_like(q, float("nan"))
        shape = (q.shape[1], q.shape[0]) if packed else q.shape[:3]
        lse = torch.full(shape, -torch.inf if packed else float("nan"))
        with self._memory() as memory:
            params = self._params(memory, q, k, v, call)
            params.out = self._head_tensor(memory, out, written=packed)
            params.lse = memory.place(lse, written=packed)
            params.lse_batch_stride = 0 if packed else lse.stride(0)
            params.lse_head_stride = lse.stride(-2)
            self.emulator.attention_forward(params, q.shape[-1], q.dtype == torch.bfloat16)
            memory.fetch(out, lse)
        return out, lse

    def backward(
        self,
        dout: Tensor,
        dlse: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        call: SimpleNamespace,
        *,
        deterministic: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor]:
        bf16, head_dim = q.dtype == torch.bfloat16, q.shape[-1]
        block_m = self.emulator.backward_step_rows(head_dim, bf16)
        packed = call.packing is not None
        fill = 0.0 if packed else float("nan")
        dq, dk, dv = (torch.full_like(x, fill) for x in (q, k, v))
        if packed:
            rows = (q.shape[0] // block_m + len(call.packing[0]) - 1) * block_m
        else:
            rows = q.shape[0] * -(-q.shape[2] // block_m) * block_m
        heads = q.shape[1]
        lse_log2, delta = torch.empty(heads, rows), torch.empty(heads, rows)
        sums = torch.zeros(heads, rows * head_dim)
        turns = torch.zeros(heads, max(rows // block_m, 1), dtype=torch.int32)
        with self._memory() as memory:
            given = self.emulator.AttentionGradientParams()
            params = self._params(memory, q, k, v, call)
            params.out = self._head_tensor(memory, out)
            params.lse = memory.place(lse)
            params.lse_batch_stride = 0 if packed else lse.stride(0)
            params.lse_head_stride = lse.stride(-2)
            given.forward = params
            given.dout = self._head_tensor(memory, dout)
            given.dq, given.dk, given.dv = (
                self._head_tensor(memory, x, written=packed) for x in (dq, dk, dv)
            )
            if dlse is not None:
                given.dlse = memory.place(dlse)
            given.lse_log2 = memory.place(lse_log2, written=False)
            given.delta = memory.place(delta, written=False)
            given.dq_sums = memory.place(sums)
            if deterministic:
                given.dq_turns = memory.place(turns)
            given.workspace_rows = rows
            self.emulator.attention_backward(given, head_dim, bf16)
            memory.fetch(dq, dk, dv)
        return dq, dk, dv

    def attention_forward(self, q, k, v, bias, padding, lengths, slopes, sinks, *rest):
        assert bias is None
        assert padding is None
        assert slopes is None
        assert sinks is None
        return self.forward(q, k, v, _call(None, lengths, *rest))

    def attention_backward(self, dout, dlse, q, k, v, out, lse, bias, padding, lengths, *rest):
        *_, bias_grad = rest
        assert not bias_grad
        call = _call(None, lengths, *rest[2:-1])
        return (*self.backward(dout, dlse, q, k, v, out, lse, call), None, None)

    def varlen_attention_forward(self, q, k, v, cu_q, cu_k, max_q, max_k, *rest):
        call = _call((cu_q, cu_k, max_q, max_k), None, *rest[3:])
        return self.forward(q, k, v, call)

    def varlen_attention_backward(self, dout, dlse, q, k, v, out, lse, *rest):
        cu_q, cu_k, max_q, max_k, _, _, _, *options, _ = rest
        call = _call((cu_q, cu_k, max_q, max_k), None, *options)
        return (*self.backward(dout, dlse, q, k, v, out, lse, call), None, None)


def _call(
    packing: tuple[Tensor, Tensor, int, int] | None,
    key_lengths: Tensor | None,
    seed: Tensor | None,
    causal: str,
    window_left: int,
    window_right: int,
    softcap: float,
    scale: float,
    dropout_p: float,
) -> SimpleNamespace:
    assert not softcap
    return SimpleNamespace(**locals())
