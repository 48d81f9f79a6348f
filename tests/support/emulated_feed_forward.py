"""The CUDA C++ feed-forward kernels in the emulator, called with torch tensors."""

from dataclasses import dataclass
from types import ModuleType

import torch
from emulated import EmulatorError, with_lines
from torch import Tensor

from fuseformer import reference
from fuseformer.philox import dropout_scale, dropout_threshold
from fuseformer.testing import assert_close_to_reference


class FeedForward:
    """The forward pass on the CPU, by an emulator that was built in some mode."""

    def __init__(self, emulator: ModuleType) -> None:
        self.emulator = emulator
        self.counters: dict[str, int] = {}  # of the last launch

    def __call__(
        self,
        x: Tensor,
        w1: Tensor,
        b1: Tensor | None,
        w2: Tensor,
        b2: Tensor | None,
        *,
        activation: str,
        dropout_p: float = 0.0,
        seed: Tensor | None = None,
        y: Tensor | None = None,
    ) -> Tensor:
        """Return what `fuseformer.reference.feed_forward` does. Raises `EmulatorError`."""
        # NaN is seen as what nobody has written, here and in what comes back.
        y = torch.full_like(x, torch.nan) if y is None else y
        tensors = (x, w1, b1, w2, b2, y, seed if dropout_p > 0 else None)
        self.emulator.report()
        try:
            addresses: dict[int, int] = {}
            places = [self._place(t, addresses, t is y) for t in tensors]
            self.emulator.feed_forward_forward(
                *places, activation, dropout_threshold(dropout_p), dropout_scale(dropout_p)
            )
            storage = y.untyped_storage()
            if storage.nbytes():
                self.emulator.copy(storage.data_ptr(), addresses[storage._cdata], storage.nbytes())
            report = self.emulator.report()
        finally:
            self.emulator.release_all()
        self.counters = report["counters"]
        if report["errors"]:
            raise EmulatorError(with_lines(report["errors"], self.emulator.__file__))
        return y

    def _place(
        self, x: Tensor | None, addresses: dict[int, int], written: bool
    ) -> tuple[object, ...] | None:
        if x is None:
            return None
        storage = x.untyped_storage()
        if storage._cdata not in addresses:
            # A result's memory is unwritten, unless there is something around it to be kept.
            fresh = written and storage.nbytes() == x.nbytes
            source = 0 if fresh else storage.data_ptr()
            addresses[storage._cdata] = self.emulator.allocate(max(storage.nbytes(), 1), source)
        start = addresses[storage._cdata] + x.storage_offset() * x.element_size()
        return start, list(x.shape), list(x.stride()), str(x.dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Case:
    """One call, with inputs by a fixed seed."""

    tokens: int
    width: int
    hidden: int
    dtype: torch.dtype
    activation: str = "relu"
    biases: str = "both"  # "both", "b1", "b2" or "none"
    dropout_p: float = 0.0

    def inputs(self) -> tuple[Tensor | None, ...]:
        """Return x, w1, b1, w2 and b2, scaled so that no layer swamps the next."""
        torch.manual_seed(0)
        x = torch.randn(self.tokens, self.width)
        w1 = torch.randn(self.hidden, self.width) * self.width**-0.5
        w2 = torch.randn(self.width, self.hidden) * max(self.hidden, 1) ** -0.5
        b1 = torch.randn(self.hidden) if self.biases in ("both", "b1") else None
        b2 = torch.randn(self.width) if self.biases in ("both", "b2") else None
        return tuple(None if t is None else t.to(self.dtype) for t in (x, w1, b1, w2, b2))

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        dropout = f"-dropout{self.dropout_p}" if self.dropout_p else ""
        shape = f"{self.tokens}x{self.width}x{self.hidden}"
        return f"{shape}-{dtype}-{self.activation}-{self.biases}{dropout}"


def check(feed_forward: FeedForward, case: Case) -> None:
    """Raise an `AssertionError` for whatever is wrong with a case."""
    inputs = case.inputs()
    options = {
        "activation": case.activation,
        "dropout_p": case.dropout_p,
        "seed": torch.tensor(0x123456789AB),
    }
    actual = feed_forward(*inputs, **options)
    wide = (None if t is None else t.double() for t in inputs)
    exact = reference.feed_forward(*wide, **options)
    assert_close_to_reference(actual, exact, reference.feed_forward(*inputs, **options))
    assert feed_forward.counters["ldmatrix_conflicts"] == 0, "bank conflicts"
    assert feed_forward.counters["shared_conflicts"] == 0, "bank conflicts of plain accesses"
