"""The CUDA C++ feed-forward kernels in the emulator, called with torch tensors."""

from dataclasses import dataclass
from types import ModuleType

import torch
from emulated import Ops
from torch import Tensor

from fuseformer import reference
from fuseformer.philox import dropout_scale, dropout_threshold
from fuseformer.testing import assert_close_to_reference


class FeedForward:
    """The resident forward pass on the CPU, by an emulator that was built in some mode."""

    def __init__(self, emulator: ModuleType) -> None:
        self.emulator = emulator
        self.ops = Ops(emulator)

    @property
    def counters(self) -> dict[str, int]:
        """What the last launch did."""
        return self.ops.counters

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
        dropout = (dropout_threshold(dropout_p), dropout_scale(dropout_p))
        self.ops.feed_forward_forward(*tensors, activation, *dropout)
        return y


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
