"""The CUDA C++ kernels in the emulator, called with torch tensors by the code that ships.

`Kernels` has the functions of the modules of `fuseformer.cuda`. The emulator stands in for the
compiled ops: it gets their arguments, in the order of their schemas.
"""

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fuseformer import backends
from fuseformer.cuda import attention, decode, feed_forward, gated_feed_forward, library

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


def _never_written(storage: Tensor) -> bool:
    """Return whether nobody has written to floats that `torch.empty` made, filled with NaN."""
    return storage.is_floating_point() and bool(storage.isnan().all())


class Ops:
    """What the compiled library offers, by the emulator: tensors are copied there and back."""

    def __init__(self, emulator: ModuleType) -> None:
        self.emulator = emulator
        self.counters: dict[str, int] = {}

    def attention_step_rows(self, q: Tensor) -> int:
        return self._count(self.emulator.attention_step_rows, q)

    def attention_forward(self, *arguments: Any) -> None:
        self._call(self.emulator.attention_forward, arguments, written=(3, 4))

    def attention_backward(self, *arguments: Any) -> None:
        self._call(self.emulator.attention_backward, arguments, written=(7, 8, 9))

    def attention_decode(self, *arguments: Any) -> None:
        self._call(self.emulator.attention_decode, arguments, written=(3, 4))

    def feed_forward_forward(self, *arguments: Any) -> None:
        self._call(self.emulator.feed_forward_forward, arguments, written=(5,))

    def feed_forward_backward(self, *arguments: Any) -> None:
        written = (5, 6, 8) if arguments[7] is None else (5, 6, 7, 8)
        self._call(self.emulator.feed_forward_backward, arguments, written)

    def feed_forward_step_tokens(self, x: Tensor) -> int:
        return self._count(self.emulator.feed_forward_step_tokens, x)

    def feed_forward_block_units(self, x: Tensor) -> int:
        return self._count(self.emulator.feed_forward_block_units, x)

    def linear_activation(self, *arguments: Any) -> None:
        written = (3,) if arguments[4] is None else (3, 4)
        self._call(self.emulator.linear_activation, arguments, written)

    def activation_gradient(self, *arguments: Any) -> None:
        written = (0, 1) if arguments[2] is None else (0, 1, 2)
        self._call(self.emulator.activation_gradient, arguments, written)

    def gated_activation(self, *arguments: Any) -> None:
        written = (3,) if arguments[4] is None else (3, 4, 5)
        self._call(self.emulator.gated_activation, arguments, written)

    def gated_gradient(self, *arguments: Any) -> None:
        self._call(self.emulator.gated_gradient, arguments, written=(0, 3, 4))

    def few_rows_hidden(self, *arguments: Any) -> None:
        written = tuple(place for place in (4, 5, 6) if arguments[place] is not None)
        self._call(self.emulator.few_rows_hidden, arguments, written)

    def few_rows_output(self, *arguments: Any) -> None:
        self._call(self.emulator.few_rows_output, arguments, written=(4,))

    @staticmethod
    def _count(function: Any, x: Tensor) -> int:
        """Return what `function` says of a tensor without looking at its contents."""
        count: int = function(
            (0, list(x.shape), list(x.stride()), str(x.dtype).removeprefix("torch."))
        )
        return count

    def _call(self, function: Any, arguments: tuple[Any, ...], written: tuple[int, ...]) -> None:
        """Call `function`, and copy back the tensors at the places `written`."""
        self.emulator.report()
        storages: dict[int, tuple[Any, int]] = {}
        try:
            places = [self._place(x, storages) if isinstance(x, Tensor) else x for x in arguments]
            function(*places)
            for place in written:
                storage, address = storages[arguments[place].untyped_storage()._cdata]
                self.emulator.copy(storage.data_ptr(), address, storage.nbytes())
            report = self.emulator.report()
        finally:
            self.emulator.release_all()
        self.counters = report["counters"]
        if report["errors"]:
            raise EmulatorError(with_lines(report["errors"], self.emulator.__file__))

    def _place(self, x: Tensor, storages: dict[int, tuple[Any, int]]) -> tuple[Any, ...]:
        storage = x.untyped_storage()
        if storage._cdata not in storages:
            whole = torch.empty(0, dtype=x.dtype).set_(storage)
            source = 0 if _never_written(whole) else storage.data_ptr()
            address = self.emulator.allocate(max(storage.nbytes(), 1), source)
            storages[storage._cdata] = (storage, address)
        start = storages[storage._cdata][1] + x.storage_offset() * x.element_size()
        return start, list(x.shape), list(x.stride()), str(x.dtype).removeprefix("torch.")


@contextmanager
def _uninitialised_memory_is_nan() -> Iterator[None]:
    """Have `torch.empty` fill with NaN, by which the emulator knows what nobody has written."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic)


class Kernels:
    """`fuseformer.cuda` on the CPU, by an emulator that was built in some mode."""

    def __init__(self, emulator: ModuleType) -> None:
        self.emulator = emulator
        self.ops = Ops(emulator)

    @property
    def counters(self) -> dict[str, int]:
        """What the last launch did."""
        return self.ops.counters

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Let the backend "cuda" serve CPU tensors meanwhile."""
        served = backends.CUDA_DEVICES | {"cpu"}
        with (
            mock.patch.object(library, "ops", return_value=self.ops),
            mock.patch.object(backends, "CUDA_DEVICES", served),
            _uninitialised_memory_is_nan(),
        ):
            yield

    def __getattr__(self, name: str) -> Any:
        modules = (attention, decode, feed_forward, gated_feed_forward)
        functions = [getattr(module, name) for module in modules if hasattr(module, name)]
        if not functions:
            raise AttributeError(name)
        function = functions[0]

        def call(*arguments: Any, **named: Any) -> Any:
            with self.installed():
                return function(*arguments, **named)

        return call
